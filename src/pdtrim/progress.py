"""Progress of long work, told to whoever asked: nothing by default, a rich bar on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

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
