"""A thread that does one step of a handover, item after item, while others do theirs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

DEPTH = 2
"""Items that may wait before a step: whoever is faster waits for whoever is slower."""


class Line:
    """Runs a step on what is put, in order, in a thread of its own.

    A step that fails ends the line: what waits is dropped, so that nobody waits for room that never
    comes, and whoever puts or finishes gets the step's own error.
    """

    def __init__(self, step: Callable[..., None]) -> None:
        self._step = step
        self._items: queue.Queue[tuple[Any, ...] | None] = queue.Queue(DEPTH)
        self._error: BaseException | None = None
        self._dropping = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def put(self, *item: Any) -> None:
        """Have the step run on an item; waits while the line is full."""
        if self._error is not None:
            raise self._error
        self._items.put(item)

    def finish(self) -> None:
        """Wait until all is done. Raises what a step raised."""
        self._stop()
        if self._error is not None:
            raise self._error

    def drop(self) -> None:
        """Leave what waits undone, and wait for the step that runs."""
        self._dropping = True
        self._stop()

    def _stop(self) -> None:
        if self._thread.is_alive():
            self._items.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._items.get()) is not None:
            if self._error is None and not self._dropping:
                try:
                    self._step(*item)
                except BaseException as error:  # raised where it is waited for
                    self._error = error
            del item  # a layer's memory is not held while the next one is waited for
