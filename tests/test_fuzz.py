"""A short share of ``make fuzz``; and the fuzzer itself sees what it is there for."""

import pytest

import fuzz
from fuzz import try_one
from fuzz_targets import TARGETS, AcceptedError
from fuzz_texts import TEXTS

SHORT = 25


@pytest.mark.parametrize("kind", TARGETS + TEXTS, ids=lambda kind: kind.__name__.lower())
def test_damaged_inputs_are_refused_or_read_and_never_taken_for_sound(kind, tmp_path):
    target = kind(tmp_path)
    for i in range(SHORT):
        _, outcome, problem = try_one(target, f"short-{i}")
        assert outcome != "failed", f"short-{i}: {problem}"


@pytest.mark.parametrize("error", [KeyError("x"), AcceptedError(), MemoryError(), UnicodeError()])
def test_the_fuzzer_sees_a_fault(error):
    def target(rng):
        yield b""
        raise error

    assert try_one(target, 0)[1] == "failed"


def test_the_fuzzer_sees_a_hang(monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 1)

    def target(rng):
        yield b""
        while True:
            pass

    assert "still at work" in try_one(target, 0)[2]
