"""Which vLLM the plugin fits, and what happens beside another."""

import logging
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import pdtrim.engines.vllm
from pdtrim.engines.vllm import compat, plugin


def test_this_vllm_fits(monkeypatch):
    compat.check()
    (first, names), *_ = compat.SIGNATURES.items()
    monkeypatch.setitem(compat.SIGNATURES, first, (*names, "new"))
    with pytest.raises(RuntimeError, match=rf"{first.__qualname__} has other arguments"):
        compat.check()


@pytest.mark.parametrize("version", [f"{minor}.1.dev4+cpu" for minor in compat.TESTED])
def test_every_build_of_a_tested_minor_version_fits(monkeypatch, version):
    monkeypatch.setattr(compat.vllm, "__version__", version)
    compat.check()


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "0.3.2", "dev"])
def test_other_minor_versions_are_refused(monkeypatch, version):
    monkeypatch.setattr(compat.vllm, "__version__", version)
    words = f"does not fit vLLM {version}: it is not tested with it; install vLLM 0.32 or 0.33"
    with pytest.raises(RuntimeError, match=words):
        compat.check()


@pytest.mark.parametrize("gone", ["NixlPullConnectorWorker", "subclass_attention_backend"])
def test_plain_vllm_goes_on_where_names_are_gone(monkeypatch, caplog, gone):
    """A class without its methods, as another release may have it, or a function that moved."""
    home = sys.modules[getattr(compat, gone).__module__]
    if isinstance(getattr(home, gone), type):
        monkeypatch.setattr(home, gone, type(gone, (), {}))
    else:
        monkeypatch.delattr(home, gone)
    for name in ("cache", "compat"):
        monkeypatch.delattr(pdtrim.engines.vllm, name)
        monkeypatch.delitem(sys.modules, f"pdtrim.engines.vllm.{name}")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    plugin.register()
    assert "pdtrim cannot serve: it does not fit vLLM" in caplog.text


def test_the_extra_installs_a_tested_version():
    """The one that has run on GPUs."""
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    least, beyond = re.search(r'"vllm>=(0\.[0-9]+),<(0\.[0-9]+)"', project).groups()
    assert least in compat.TESTED and int(beyond[2:]) == int(least[2:]) + 1
