"""The jobs of the comparison on Qwen: commands that pdtrim knows, in an order that can be run."""

import importlib
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from pdtrim.cli import app

FOLDER = Path(__file__).parents[1] / "benchmarks" / "compare_qwen_202611"


@pytest.fixture
def jobs(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))
    words = ["run.py", "--model", "m", "--data", str(tmp_path / "data"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    names = ("jobs", "queueing", "run")
    made, run = (importlib.import_module(name) for name in ("jobs", "run"))
    yield made.all_jobs(made.Settings.of(run.arguments()))
    for name in names:
        sys.modules.pop(name, None)


def test_every_job_is_a_command_that_is_understood(jobs):
    verbs = get_command(app).commands
    assert len(jobs) > 60 and len({job.name for job in jobs}) == len(jobs)
    for job in jobs:
        what, *words = job.command
        if what.endswith(".py"):
            assert Path(what).is_file()
            continue
        known = {
            option for one in verbs[what].params for option in (*one.opts, *one.secondary_opts)
        }
        used = {word for word in words if word.startswith("-") and not word[1:2].isdigit()}
        assert used <= known, (job.name, used - known)


def test_what_a_job_needs_another_makes(jobs):
    """Or a comparison leaves it in its folder: the texts, and the plans of its systems."""
    made = {path for job in jobs for path in job.makes}
    for cell in [path.parent for path in made if path.name == "_pair.json"]:
        folder = cell.parent.parent
        made.add(folder / "plans" / f"{cell.name}.json")
    for job in jobs:
        missing = [path for path in job.needs if path not in made and path.parent.name != "text"]
        assert not missing, (job.name, missing)
