"""A search that is killed goes on where it was: real processes, a real kill."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pdtrim.plan import PrunePlan

# a shell's background jobs, and so perhaps these tests, are started with SIGINT ignored
START = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    " from pdtrim.cli import main; main()"
)


def words(folder, text, output):
    return [
        *(sys.executable, "-c", START, "plan", str(folder), "-o", str(output)),
        *("--calibration", str(text), "--prefill-remove", "2", "--decode-remove", "1"),
        *("--prompt-tokens", "48", "--continuation-tokens", "16", "--sequences", "4"),
        *("--kv-compression", "2", "--dtype", "float32"),
    ]


def run(command, **settings):
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **settings)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=lambda s: s.name)
def test_a_killed_plan_is_resumed_to_the_same_plan(tiny_folder, tiny_text, tmp_path, how):
    whole, cut = tmp_path / "whole.json", tmp_path / "cut.json"
    done = run(words(tiny_folder, tiny_text, whole))
    assert done.returncode == 0, done.stderr
    journal = tmp_path / "cut.search" / "journal.jsonl"
    process = subprocess.Popen(
        words(tiny_folder, tiny_text, cut),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and lines(journal) < 8:
        pass  # the kill comes in the middle of the search, whenever that is
    process.send_signal(how)
    _, told = process.communicate(timeout=60)
    assert process.returncode != 0 and not cut.exists(), "the search ended before the kill"
    kept = journal.read_text().splitlines()[:8]
    if how == signal.SIGINT:
        assert "--resume goes on" in told
    refused = run(words(tiny_folder, tiny_text, cut))
    assert refused.returncode == 2 and "add --resume" in refused.stderr
    assert journal.read_text().splitlines()[:8] == kept, "a refusal loses nothing"
    other = run([*words(tiny_folder, tiny_text, cut), "--resume", "--seed", "1"])
    assert other.returncode == 2 and "other" in other.stderr
    resumed = run([*words(tiny_folder, tiny_text, cut), "--resume"])
    assert resumed.returncode == 0, resumed.stderr
    a, b = PrunePlan.load(whole), PrunePlan.load(cut)
    assert a.digest == b.digest
    assert a.provenance.search_block_tokens == b.provenance.search_block_tokens
    assert not journal.parent.exists()


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
