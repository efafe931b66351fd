"""Seconds of work on a device, by the host's clock."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def finish(*devices: torch.device) -> None:
    """Wait for all work on some devices."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds from an idle device to its end of the work."""
    finish(device)
    started = time.perf_counter()
    run()
    finish(device)
    return time.perf_counter() - started
