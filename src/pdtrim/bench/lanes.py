"""Work that runs beside other work: CUDA streams, or threads on a CPU, with marks to time it by.

A mark is a point in a lane's work. On a GPU it is an event, so that times are the device's own; on
a CPU, where a call returns when its work is done, it is the clock's reading.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from pdtrim.clock import finish

K = TypeVar("K")
Mark = Any
"""A CUDA event, or seconds of the clock."""


def facts_of(device: torch.device) -> dict[str, Any]:
    """What a report says of the machine that it was measured on."""
    return {
        "device": str(device),
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
    }


class Lane:
    """Work in order on a device: a stream of its own on a GPU, the calling thread on a CPU.

    Args:
        first: its work goes before that of other lanes where both wait for the device.
    """

    def __init__(self, device: torch.device, *, first: bool = False) -> None:
        self.device = device
        self._stream = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device, priority=-1 if first else 0)

    @contextmanager
    def work(self) -> Iterator[None]:
        """What is launched in the block belongs to this lane."""
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> Mark:
        """This point of the lane's work."""
        if self._stream is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def wait(self, mark: Mark) -> None:
        """Later work of this lane starts when the other lane has passed a mark."""
        if self._stream is not None:
            self._stream.wait_event(mark)

    def reached(self, mark: Mark) -> Mark:
        """When this lane knows that another, perhaps on another device, has passed a mark."""
        if self._stream is None:
            return mark
        self.wait(mark)
        return self.mark()


def seconds(start: Mark, stop: Mark) -> float:
    """Between two marks on one device, both passed."""
    if isinstance(start, float):
        return float(stop - start)
    return start.elapsed_time(stop) / 1000


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def timed(run: Callable[[], object], lane: Lane, *devices: torch.device) -> float:
    """Seconds of a lane's work, nothing else being under way on some devices."""
    finish(*devices)
    with lane.work():
        start = lane.mark()
        run()
        stop = lane.mark()
    finish(*devices)
    return seconds(start, stop)


def timed_rounds(
    runs: Mapping[K, Callable[[], object]],
    lane: Lane,
    repeats: int,
    advance: Callable[[float], None] = lambda done: None,
) -> dict[K, list[float]]:
    """Seconds of each run in each round, in turn, behind a round that warms up."""
    times: dict[K, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            taken = timed(run, lane, lane.device)
            if repeat:
                times[name].append(taken)
            advance(1)
    return times
