"""What the launches of all codecs share.

Shapes: L heads, T tokens of the cache, M of them kept, D head width.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

ALIGNED = 16
"""Bytes: a tensor that starts at a multiple of it is read and written by wide words."""
TILE = 8192
"""Elements a program holds in registers: 64 tokens of 128 channels."""


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever its arguments' device is."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def tokens_of(width: int) -> int:
    """Tokens a tile."""
    return max(16, TILE // triton.next_power_of_2(width))


def threads(elements: int) -> dict[str, int]:
    """Launch options of a program of so many elements: 32 a thread, two such programs a core."""
    warps = min(16, max(4, elements // 1024))
    return {"num_warps": warps, "maxnreg": 1024 // warps}


def rows(x_LTD: Tensor) -> Tensor:
    """The cache itself where a token's channels lie together, else a copy."""
    return x_LTD if x_LTD.stride(2) == 1 or x_LTD.shape[2] == 1 else x_LTD.contiguous()


def aligned(data: Tensor) -> Tensor:
    """The bytes themselves where they start at an aligned address, else a copy that does."""
    return data.clone() if data.data_ptr() % ALIGNED else data


def source(
    k_LTD: Tensor, v_LTD: Tensor, kept_LM: Tensor | None
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Pointers to keys, values and kept tokens (to anything where all are kept), and strides."""
    kept, at = (k_LTD, (0, 0)) if kept_LM is None else (kept_LM, kept_LM.stride())
    return (k_LTD, v_LTD, kept), (*k_LTD.stride()[:2], *v_LTD.stride()[:2], *at)
