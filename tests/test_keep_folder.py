"""Outputs: locks between runs, marked folders, and what is other people's."""

import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from helpers import export, make_plan, tiny_model
from pdtrim.cli import app
from pdtrim.errors import PdtrimError
from pdtrim.keep.files import CannotWrite, beside, write_text
from pdtrim.keep.folder import (
    LOCK,
    MARK,
    claim_folder,
    is_there,
    output_file,
    output_folder,
    remove,
)
from pdtrim.keep.lock import lock
from pdtrim.plan import Gates
from pdtrim.verbs.work import Work

HOLDER = """
import sys
from pathlib import Path
from pdtrim.keep.lock import lock
with lock(Path(sys.argv[1]), "it", shared=sys.argv[2] == "shared"):
    print("held", flush=True)
    sys.stdin.read()
"""


def holding(path, how="alone"):
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout.readline() == b"held\n"
    return child


@pytest.fixture
def held(tmp_path):
    """Another process that holds locks, by path; all are killed at the end."""
    children = []

    def start(path, how="alone"):
        children.append(holding(path, how))
        return children[-1]

    yield start
    for child in children:
        child.kill()
        child.wait()


def refused(words, output):
    with pytest.raises(PdtrimError, match=words), output:
        pytest.fail("two at once")


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_second_run_is_told_who_holds_the_output_and_a_kill_releases_it(tmp_path, held):
    path = tmp_path / "plan.json"
    child = held(beside(path, ".lock"))
    refused(rf"plan\.json is being written by process {child.pid}:", output_file(path))
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert contents(tmp_path), "the lock's file is left by the kill"
    with output_file(path):
        refused("is being written by process", output_file(path))
    assert not contents(tmp_path)


def test_two_links_to_one_file_are_one_output(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "real" / "plan.json")
    with output_file(tmp_path / "a"):
        refused("is being written", output_file(tmp_path / "real" / "plan.json"))


def test_parts_share_a_folder_and_the_whole_does_not(tmp_path, held):
    folder = tmp_path / "out"
    with output_folder(folder, "comparison", shared=True):
        write_text(folder / "cell", "x")
        child = held(folder / LOCK, "shared")
        refused("out is being written by process", output_folder(folder, "comparison"))
    refused(f"process {child.pid}", output_folder(folder, "comparison"))
    child.communicate()
    with output_folder(folder, "comparison"):
        refused("is being written", output_folder(folder, "comparison", shared=True))
    assert sorted(p.name for p in folder.iterdir()) == [MARK, "cell"]


def test_a_lock_that_was_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    import fcntl

    path, real = tmp_path / "x.lock", fcntl.flock

    def slow(place, how):
        monkeypatch.setattr(fcntl, "flock", real)
        path.unlink()  # its owner was done between our two calls
        real(place, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with lock(path, "x"):
        assert path.exists()
        refused("is being written", lock(path, "x"))


def test_a_folder_that_cannot_be_locked_is_said_before_the_work(tmp_path, monkeypatch):
    import fcntl

    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    refused("No locks available; give an -o on a local disk", output_file(tmp_path / "x"))


def test_folders_are_marked_and_others_refused(tmp_path):
    with output_folder(tmp_path / "new" / "out", "demo"):
        (tmp_path / "new" / "out" / "result").touch()
    assert is_there(tmp_path / "new" / "out", "demo")
    with pytest.raises(PdtrimError, match="is a folder for 'demo', not for 'ablation'"):
        claim_folder(tmp_path / "new" / "out", "ablation")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    assert not is_there(theirs, "demo")  # empty: anybody's
    (theirs / "thesis.tex").write_text("dear")
    for make in (claim_folder, is_there):
        with pytest.raises(PdtrimError, match=r"holds 'thesis\.tex' and no mark"):
            make(theirs, "demo")
    with pytest.raises(PdtrimError, match="is a file"):
        claim_folder(theirs / "thesis.tex", "demo")
    remove(theirs, ["*"])
    assert [p.name for p in theirs.iterdir()] == ["thesis.tex"]


def test_a_new_folder_is_gone_if_nothing_came_of_it(tmp_path):
    with pytest.raises(ZeroDivisionError), output_folder(tmp_path / "a", "demo"):
        _ = 1 / 0
    (tmp_path / "empty").mkdir()
    with output_folder(tmp_path / "empty", "demo"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


def test_removal_takes_what_we_wrote_and_no_more(tmp_path):
    folder = tmp_path / "plan.search"
    claim_folder(folder, "search")
    for name in ("journal.jsonl", "text.safetensors", "notes.txt"):
        (folder / name).touch()
    (folder / "journal.jsonl.d").mkdir()
    remove(folder, ["journal.jsonl*", "text.safetensors"])
    assert sorted(p.name for p in folder.iterdir()) == ["journal.jsonl.d", "notes.txt"]
    with pytest.raises(PdtrimError, match="no mark"):
        claim_folder(folder, "search")


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_planning_never_removes_a_folder_that_it_did_not_make(tmp_path, tiny_folder, resume):
    theirs = tmp_path / "model.search"
    theirs.mkdir()
    (theirs / "journal.jsonl").write_text("a year of notes")
    (theirs / "deep").mkdir()
    before = contents(tmp_path)
    output = str(tmp_path / "model.json")
    done = CliRunner().invoke(app, ["plan", str(tiny_folder), "-o", output, *resume])
    assert isinstance(done.exception, PdtrimError) and "no mark of pdtrim" in str(done.exception)
    assert contents(tmp_path) == before and (theirs / "deep").is_dir()


FOLDER_VERBS = {
    "ablate": ("--text", "t.txt"),
    "kv-sweep": ("--text", "t.txt"),
    "sensitivity": (),
    "compare": (),
    "demo": None,
}


@pytest.mark.parametrize("verb", FOLDER_VERBS)
def test_a_foreign_folder_is_left_alone_before_anything_is_loaded(tmp_path, verb, held):
    (tmp_path / "table.md").write_text("mine")
    (tmp_path / "result.json").write_text("mine too")
    options = FOLDER_VERBS[verb]
    words = [verb, *(() if options is None else ("./nowhere", *options)), "-o", str(tmp_path)]
    before = contents(tmp_path)
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, PdtrimError) and "no mark of pdtrim" in str(done.exception)
    assert contents(tmp_path) == before
    out = tmp_path / "out"
    what = {"kv-sweep": "sweep of KV policies", "ablate": "ablation", "compare": "comparison"}
    claim_folder(out, what.get(verb, verb))
    held(out / LOCK)
    done = CliRunner().invoke(app, [*words[:-1], str(out)])
    assert "out is being written by process" in str(done.exception)


FILE_VERBS = {
    "plan": ("./nowhere",),
    "distill": ("./nothing.json",),
    "eval": ("./nothing.json", "--text", "t.txt"),
}


@pytest.mark.parametrize("verb", FILE_VERBS)
def test_a_foreign_file_is_left_alone_before_anything_is_loaded(tmp_path, verb, held):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "llama"}')
    done = CliRunner().invoke(app, [verb, *FILE_VERBS[verb], "-o", str(path)])
    assert "is there and not from pdtrim" in str(done.exception)
    assert path.read_text() == '{"model_type": "llama"}'
    held(beside(tmp_path / "out.json", ".lock"))
    done = CliRunner().invoke(app, [verb, *FILE_VERBS[verb], "-o", str(tmp_path / "out.json")])
    assert "out.json is being written by process" in str(done.exception)


def test_two_exports_into_one_folder(tmp_path, held):
    model = tiny_model("llama")
    plan = make_plan(model, Gates.dense(4))
    export(plan, model, tmp_path / "pair")
    before = contents(tmp_path)
    child = held(tmp_path / "pair" / LOCK)
    with pytest.raises(PdtrimError, match=f"pair is being written by process {child.pid}"):
        export(plan, model, tmp_path / "pair")
    child.kill()
    child.communicate()
    export(plan, model, tmp_path / "pair")
    assert contents(tmp_path) == before


def test_a_search_keeps_its_work_when_the_disk_is_full(tmp_path):
    folder = tmp_path / "plan.search"
    with pytest.raises(CannotWrite), Work(folder, resume=False, say=print) as work:
        work.journal.write_text("hours")
        raise CannotWrite("no space")
    with pytest.raises(PdtrimError, match="add --resume"):
        Work(folder, resume=False, say=print)
    with Work(folder, resume=True, say=print) as work:
        assert work.journal.read_text() == "hours"
    assert not folder.exists()
    with pytest.raises(PdtrimError), Work(folder, resume=False, say=print) as work:
        raise PdtrimError("a mistake")
    assert not folder.exists()
