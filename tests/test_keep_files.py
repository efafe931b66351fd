"""Files that are written whole or not at all, whatever fails and wherever a process is killed."""

import contextlib
import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pdtrim
from helpers import make_plan, tiny_model
from pdtrim.errors import PdtrimError
from pdtrim.keep import files
from pdtrim.keep.files import (
    CannotWrite,
    check_ours,
    remove_parts,
    sha256_of,
    whole,
    write_bytes,
    write_json,
    write_text,
)
from pdtrim.keep.tensors import write_tensors
from pdtrim.plan import Gates, PrunePlan

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@contextlib.contextmanager
def full_disk(largest=64):
    """The system refuses to let any file grow beyond a few bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def failing(*_, **__):
    raise FULL


@pytest.mark.parametrize(
    "owner,name", [(Path, "write_bytes"), (os, "fsync"), (Path, "chmod"), (os, "replace")]
)
def test_a_failure_at_any_step_leaves_the_old_file(tmp_path, monkeypatch, owner, name):
    path = tmp_path / "plan.json"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        with pytest.raises(CannotWrite, match=r"cannot write .*plan\.json: No space left") as told:
            write_bytes(path, b"new")
    assert "\n" not in str(told.value) and ".part" not in str(told.value)
    assert path.read_bytes() == b"old" and names(tmp_path) == ["plan.json"]
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new" and names(tmp_path) == ["plan.json"]


def test_a_failure_behind_the_rename_leaves_the_new_file_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "sync_folder", failing)
    with pytest.raises(CannotWrite):
        write_bytes(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new" and names(tmp_path) == ["x"]


def test_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    steps = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: steps.append(Path(os.readlink(f"/proc/self/fd/{fd}"))) or sync(fd)
    )
    monkeypatch.setattr(os, "replace", lambda a, b: steps.append("replace") or replace(a, b))
    write_bytes(tmp_path / "x", b"new")
    part, step, folder = steps
    assert (part.parent, step, folder) == (tmp_path, "replace", tmp_path)


def test_an_interruption_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "x", "old")
    with pytest.raises(KeyboardInterrupt), whole(tmp_path / "x") as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "x").read_text() == "old" and names(tmp_path) == ["x"]


CHILD = """
import sys, time
from pdtrim.keep.files import whole
with whole(sys.argv[1]) as part:
    part.write_text("half")
    print("half", flush=True)
    sys.stdin.read()  # until it is killed
"""


def test_a_kill_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("old")
    (tmp_path / ".other.json.0123456789abcdef.part").touch()  # of another output
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout.readline() == b"half\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert path.read_text() == "old"
    assert len(names(tmp_path)) == 3, "what was written so far"
    remove_parts(path)
    assert names(tmp_path) == [".other.json.0123456789abcdef.part", "plan.json"]


def test_a_link_stays_a_link_and_modes_stay(tmp_path):
    (tmp_path / "disk").mkdir()
    target = tmp_path / "disk" / "real.json"
    target.write_text("old")
    target.chmod(0o640)
    link = tmp_path / "link.json"
    link.symlink_to(target)
    write_json(link, {"a": 1})
    assert link.is_symlink() and json.loads(target.read_text()) == {"a": 1}
    assert target.stat().st_mode & 0o777 == 0o640 and names(target.parent) == ["real.json"]
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "later" / "x")
    write_text(dangling, "new")
    assert dangling.is_symlink() and (tmp_path / "later" / "x").read_text() == "new"
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "fresh", "")
    finally:
        os.umask(old)
    assert (tmp_path / "fresh").stat().st_mode & 0o777 == 0o640


def test_text_is_utf8_with_plain_line_ends_whatever_the_system_says(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "linesep", "\r\n")
    write_text(tmp_path / "x", "é\n\udce9")
    assert (tmp_path / "x").read_bytes() == "é\n".encode() + rb"\udce9"


def test_only_files_are_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, words in (
        (tmp_path, "is a folder"),
        (tmp_path / "pipe", "device or a pipe"),
        (Path("/dev/null"), "device or a pipe"),
    ):
        with pytest.raises(PdtrimError, match=words):
            write_text(path, "x")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CannotWrite, match="cannot write"):
        write_text(tmp_path / "file" / "below", "x")
    assert names(tmp_path) == ["file", "pipe"]


def test_names_as_long_as_the_file_system_takes(tmp_path):
    write_text(tmp_path / ("é" * 125), "x")
    assert names(tmp_path) == ["é" * 125]


@pytest.fixture(scope="module")
def plan():
    return make_plan(tiny_model("llama"), Gates.dense(4))


def save_plan(plan, path):
    plan.save(path)


def save_weights(plan, path):
    write_tensors(path, {"a": torch.zeros(400)})


def save_picture(plan, path):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    with whole(path) as part:
        figure.savefig(part, format="png")


@pytest.mark.parametrize("save", [save_plan, save_weights, save_picture])
def test_a_full_disk_costs_no_old_plan_weights_or_picture(plan, tmp_path, save):
    path = tmp_path / "result"
    save(plan, path)
    before = path.read_bytes()
    assert len(before) > 64
    with full_disk(), pytest.raises(CannotWrite, match="cannot write"):
        save(plan, path)
    assert path.read_bytes() == before and names(tmp_path) == ["result"]


def test_nothing_in_the_package_writes_in_another_way():
    """Only the logits that decode hands to its parent, in a folder of the two, are no result."""
    source = Path(pdtrim.__file__).parent
    writes = re.compile(
        r"\.write_(text|bytes)\(|\bsave_file\(|np\.save|torch\.save|json\.dump\("
        r"""|\bopen\([^)]*["'][wax]b?\+?["']|savefig\((?!part\b)"""
    )
    found = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*.py")
        if writes.search(path.read_text(encoding="utf-8"))
    }
    assert found == {*("keep/files.py", "keep/journal.py", "keep/tensors.py", "runtime/decode.py")}


def test_other_peoples_files_are_told_from_ours(plan, tmp_path):
    path = tmp_path / "x.json"
    check_ours(path)
    path.touch()
    check_ours(path)
    plan.save(path)
    check_ours(path)
    for text in ('{"model": "mine"}', '["schema"]', "# Thesis", '{"schema": "other/1"}'):
        path.write_text(text)
        with pytest.raises(PdtrimError, match="is there and not from pdtrim"):
            check_ours(path)


def test_a_file_has_the_hash_of_its_bytes(plan, tmp_path):
    plan.save(tmp_path / "a")
    PrunePlan.load(tmp_path / "a").save(tmp_path / "b")
    assert sha256_of(tmp_path / "a") == sha256_of(tmp_path / "b")
    write_bytes(tmp_path / "b", bytes(3 * 2**20) + b"1")
    write_bytes(tmp_path / "a", bytes(3 * 2**20) + b"2")
    assert sha256_of(tmp_path / "a") != sha256_of(tmp_path / "b")
