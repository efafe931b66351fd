"""A search that is killed goes on where it was: a real process, a real kill."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from in_process import run_here
from pdtrim.plan import PrunePlan

# a shell's background jobs, and so perhaps these tests, are started with SIGINT ignored
START = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    " from pdtrim.cli import main; main()"
)


def words(folder, text, output):
    return [
        *("plan", folder, "-o", output, "--calibration", text),
        *("--prefill-remove", "2", "--decode-remove", "1", "--sequences", "4"),
        *("--prompt-tokens", "48", "--continuation-tokens", "16"),
        *("--kv-compression", "2", "--dtype", "float32"),
    ]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=lambda s: s.name)
def test_a_killed_plan_is_resumed_to_the_same_plan(
    tiny_folder, tiny_text, tmp_path, how, monkeypatch, capsys
):
    def run(output, *more):
        command = [*words(tiny_folder, tiny_text, output), *more]
        code, _, told = run_here(monkeypatch, capsys, *command)
        return code, told

    whole, cut = tmp_path / "whole.json", tmp_path / "cut.json"
    code, told = run(whole)
    assert code == 0, told
    journal = tmp_path / "cut.search" / "journal.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", START, *map(str, words(tiny_folder, tiny_text, cut))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and lines(journal) < 8:
        time.sleep(0.001)  # the kill comes in the middle of the search, whenever that is
    process.send_signal(how)
    _, told = process.communicate(timeout=60)
    assert process.returncode != 0 and not cut.exists(), "the search ended before the kill"
    kept = journal.read_text().splitlines()[:8]
    if how == signal.SIGINT:
        assert "--resume goes on" in told
    code, told = run(cut)
    assert code == 2 and "add --resume" in told
    assert journal.read_text().splitlines()[:8] == kept, "a refusal loses nothing"
    code, told = run(cut, "--resume", "--seed", "1")
    assert code == 2 and "other" in told
    code, told = run(cut, "--resume")
    assert code == 0, told
    a, b = PrunePlan.load(whole), PrunePlan.load(cut)
    assert a.digest == b.digest
    assert a.provenance.search_block_tokens == b.provenance.search_block_tokens
    assert not journal.parent.exists()


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
