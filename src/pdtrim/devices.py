"""A device by its name, and a lane beside the work of its model."""

from __future__ import annotations

import torch

from pdtrim.errors import PdtrimError


def device_of(name: str) -> torch.device:
    """The CPU, or a GPU with its number.

    Raises:
        PdtrimError: neither, or a GPU that is not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise PdtrimError(f"no device '{name}': give cpu, cuda or cuda:NUMBER")
    if device.type == "cpu":
        return device
    device = torch.device("cuda", device.index or 0)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.index >= count:
        raise PdtrimError(f"device '{name}': torch finds {count} GPUs here")
    return device


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream for work beside a model's, which goes first where both wait; None on a CPU.

    Whoever has one keeps it: memory is cached by stream.
    """
    return torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
