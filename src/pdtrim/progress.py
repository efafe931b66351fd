"""Progress of long work, told to whoever asked: nothing, a bar on a terminal, or lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TextIO

Advance = Callable[[float], None]
Progress = Callable[[str, float], AbstractContextManager[Advance]]
"""``with progress("what", total) as advance: advance(1)``."""


@contextmanager
def silent(what: str, total: float) -> Iterator[Advance]:
    """Say nothing."""
    del what, total
    yield lambda amount: None


@contextmanager
def bar(what: str, total: float) -> Iterator[Advance]:
    """A bar on standard error, gone when the work is done."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as display:
        task = display.add_task(what, total=total)
        yield lambda amount: display.advance(task, amount)


EVERY_S = 30.0
"""Seconds between two lines of the same work."""


@contextmanager
def lines(
    what: str,
    total: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    stream: TextIO | None = None,
) -> Iterator[Advance]:
    """A line every half minute on standard error: what is done, and about how long the rest takes.

    Work that is done sooner says nothing.
    """
    begun = last = clock()
    done = 0.0

    def advance(amount: float) -> None:
        nonlocal done, last
        done += amount
        now = clock()
        if now - last < EVERY_S:
            return
        last = now
        share = min(done / total, 1.0) if total else 1.0
        rest = (now - begun) * (1 - share) / share if share else 0.0
        text = f"{what}: {share:.0%} done in {_span(now - begun)}"
        text += f", about {_span(rest)} left" if 0 < share < 1 else ""
        print(text, file=stream or sys.stderr, flush=True)

    yield advance


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
