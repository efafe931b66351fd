"""vLLM's servers under a benchmark: start them, and read what they counted."""

from __future__ import annotations

import contextlib
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import torch

from pdtrim.engines.base import Process
from pdtrim.engines.supervise import serve

COUNTERS = {
    "handovers": "vllm:nixl_bytes_transferred_count",
    "bytes": "vllm:nixl_bytes_transferred_sum",
    "descriptors": "vllm:nixl_num_descriptors_sum",
    "post_s": "vllm:nixl_post_time_seconds_sum",
    "transfer_s": "vllm:nixl_xfer_time_seconds_sum",
    "handover_s": "pdtrim:handover_seconds_sum",  # with polling and decoding; ours only
}


@contextlib.contextmanager
def running(made: list[Process], log: Path, seconds: float) -> Iterator[None]:
    """Processes that all answer, and that end with the block."""
    ready, stop, failed = threading.Event(), threading.Event(), []

    def run() -> None:
        try:
            with log.open("a") as out:
                serve(
                    made,
                    start_seconds=seconds,
                    say=lambda text: ready.set(),
                    stop=stop,
                    log=lambda name, line: print(f"{name} | {line}", file=out, flush=True),
                )
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        while thread.is_alive() and not ready.wait(0.5):
            pass
        if failed:
            raise failed[0]
        yield
    finally:
        stop.set()
        thread.join()


def lines_of(url: str) -> list[str]:
    """A server's metrics."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        return answer.read().decode().splitlines()


def sum_of(lines: list[str], name: str) -> float:
    """Of a metric's samples."""
    return sum(float(x.rsplit(" ", 1)[1]) for x in lines if x.startswith(f"{name}{{"))


def counters(url: str) -> dict[str, float]:
    """A decode server's sums so far, by the names of ``COUNTERS``."""
    lines = lines_of(url)
    return {key: sum_of(lines, name) for key, name in COUNTERS.items()}


def quantile(values: list[float], q: float) -> float:
    """Between the two nearest."""
    return float(torch.tensor(values or [0.0], dtype=torch.float64).quantile(q))
