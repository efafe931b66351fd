"""The public names, and what importing them costs."""

import subprocess
import sys

import pdtrim


def test_every_public_name_resolves_and_is_documented():
    for name in pdtrim.__all__:
        assert getattr(pdtrim, name).__doc__, name
    assert sorted(pdtrim._HOMES) == sorted(pdtrim.__all__)


def test_importing_pdtrim_and_its_command_loads_no_torch():
    code = "import pdtrim, pdtrim.cli, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
