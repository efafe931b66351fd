"""The command run in the tests' own process: what a new one would import is there already."""

import sys

import pytest

import pdtrim.cli as cli
from pdtrim.cli.common import console


def run_here(monkeypatch, capsys, *words):
    """The command, as its entry point runs it: exit code, output, error output."""
    monkeypatch.setattr(sys, "argv", ["pdtrim", *map(str, words)])
    modules = [module for name, module in sys.modules.items() if name.startswith("pdtrim.cli")]
    for name in ("out", "err"):  # made anew, as they hold the streams of the first test
        made = console(stderr=name == "err")
        for module in modules:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, made)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr()
    return ended.value.code, shown.out, shown.err
