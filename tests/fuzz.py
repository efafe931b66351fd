"""Everything that pdtrim reads, damaged at random: ``make fuzz``.

Each target (``fuzz_targets.py``) reads damaged bytes as a user's run would. Allowed are an error of
ours on one line, or a result, which a target holds against what was written. An input that takes
longer than ``SECONDS`` is a hang.
"""

import argparse
import collections
import contextlib
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from fuzz_targets import REPOSITORY, TARGETS
from fuzz_texts import TEXTS
from pdtrim.errors import PdtrimError

SECONDS = 20
MEMORY = 12 * 2**30


class HangError(Exception):
    """An input took too long."""


@contextlib.contextmanager
def limited():
    """Turn a hang into an error."""

    def ring(*_):
        raise HangError(f"still at work after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def try_one(target, seed):
    """One input of a target: its bytes, what came of it, and the error if it is one of ours to fix.

    Returns:
        (bytes, "refused" or "read", None), or (bytes, "failed", traceback).
    """
    steps = target(random.Random(seed))
    data = next(steps)
    try:
        with limited():
            next(steps, None)
    except PdtrimError as error:
        text = str(error)
        if text.isprintable() and len(text) < 1100:
            return data, "refused", None
        return data, "failed", f"an error of more than a line: {text[:2000]!r}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return data, "failed", traceback.format_exc()
    return data, "read", None


def fuzz(inputs, seed, *, names=(), failures=None, say=print):
    """Try so many inputs over all targets; returns counts by target and the failures."""
    folder = Path(tempfile.mkdtemp(prefix="pdtrim-fuzz-"))
    counts, failed = {}, []
    kinds = [kind for kind in TARGETS + TEXTS if not names or kind.__name__.lower() in names]
    shares = sum(kind.share for kind in kinds)
    try:
        for kind in kinds:
            place = folder / kind.__name__.lower()
            place.mkdir()
            target, count = kind(place), collections.Counter()
            started = time.perf_counter()
            for i in range(max(1, round(inputs * kind.share / shares))):
                at = f"{kind.__name__.lower()}-{seed}-{i}"
                data, outcome, problem = try_one(target, at)
                count[outcome] += 1
                if problem is not None:
                    failed.append((at, problem))
                    say(f"{at}: {problem}")
                    if failures is not None:
                        failures.mkdir(parents=True, exist_ok=True)
                        (failures / at).write_bytes(data)
            counts[kind.__name__.lower()] = count
            say(
                f"{kind.__name__:10}{count.total():7} inputs {count['refused']:7} refused"
                f" {count['read']:6} read {count['failed']:4} failed"
                f" {time.perf_counter() - started:7.1f} s"
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return counts, failed


def main():
    """Fuzz, and exit with 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="targets, comma separated")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    names = tuple(filter(None, options.only.split(",")))
    counts, failed = fuzz(
        options.inputs, options.seed, names=names, failures=REPOSITORY / "out" / "fuzz"
    )
    total = sum(count.total() for count in counts.values())
    print(f"{total} inputs, {len(failed)} failed; seed {options.seed}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
