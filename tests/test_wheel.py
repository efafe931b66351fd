"""The wheel and the sdist: they build, and the wheel alone is what the README says."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from helpers import tiny_model

ROOT = Path(__file__).parent.parent


def run(*command, cwd, **env):
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist of a copy of the tree, and the wheel that is built from the sdist."""
    place = tmp_path_factory.mktemp("built")
    tree = place / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__"))
    hatchling = (sys.executable, "-m", "hatchling", "build")
    run(*hatchling, "-t", "sdist", "-d", place / "dist", cwd=tree)
    (sdist,) = (place / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(place / "unpacked", filter="data")
    (unpacked,) = (place / "unpacked").iterdir()
    run(*hatchling, "-t", "wheel", "-d", place / "dist", cwd=unpacked)
    (wheel,) = (place / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def site(built, tmp_path_factory):
    """The wheel installed alone; what it depends on is this environment's."""
    place = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index")
    run(*pip, "--disable-pip-version-check", "--target", place, built, cwd=place)
    return place


def test_the_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    source = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == source and "pdtrim/py.typed" in names


def test_the_installed_command_prints_its_help(site):
    shown = run(site / "bin" / "pdtrim", "--help", cwd=site, PYTHONPATH=str(site))
    assert "Usage: pdtrim" in shown and "compare" in shown


def test_the_installed_package_has_what_was_measured(site):
    code = (
        "from pdtrim.cost.kept import codec_files, kept_names\n"
        "print(*kept_names('h100_sxm'), *(x.source for x in codec_files((), 'h100_sxm')))"
    )
    shown = run(sys.executable, "-c", code, cwd=site, PYTHONPATH=str(site))
    assert "llama-3.1-8b" in shown and "codecs_202611/bench_256_3824_128.json" in shown


def test_the_installed_package_runs_the_readmes_snippet(site, tiny_folder, tmp_path):
    (snippet,) = re.findall("```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    tiny_model("llama", layers=9, vocab_size=64).network.save_pretrained(model)
    little = "prompt_tokens=16, continuation_tokens=8, sequences=2, fit_sequences=2"
    for said, instead in (('"smollm2"', f'"{model}"'), ("_remove=8", f"_remove=8, {little}")):
        assert snippet.count(said) == 1
        snippet = snippet.replace(said, instead)
    code = snippet + "\nprint(pdtrim.__file__)\n"
    shown = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site))
    assert shown.splitlines()[-1] == str(site / "pdtrim" / "__init__.py")
    assert (tmp_path / "out" / "pair" / "decode" / "config.json").is_file()
