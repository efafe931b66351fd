"""The checksum of ``kv/checksum.py`` in one pass over memory.

One program a run of words; the sums of all are added up in no order, which wrapping sums allow.

Shapes: W words of 8 bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdtrim.kv.kernels.launch import on

BLOCK = 4096
"""Words of a program."""


def checksum(words_W: Tensor, gamma: int, first: int, second: int) -> Tensor:
    """int64 of int64 words on a GPU, with the three factors of the torch path."""
    total_1 = torch.zeros(1, dtype=torch.int64, device=words_W.device)
    W = words_W.numel()
    if W:
        with on(words_W.device):
            checksum_kernel[(triton.cdiv(W, BLOCK),)](
                words_W, total_1, W, GAMMA=gamma, FIRST=first, SECOND=second, BLOCK=BLOCK
            )
    return total_1[0]


@triton.jit(do_not_specialize=["W"])
def checksum_kernel(
    words_ptr, total_ptr, W,
    GAMMA: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """SplitMix64's finaliser of each word and its number, summed."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(words_ptr + at, mask=at < W, other=0).to(tl.uint64, bitcast=True)
    x += (at + 1).to(tl.uint64) * GAMMA
    x = (x ^ (x >> 30)) * FIRST
    x = (x ^ (x >> 27)) * SECOND
    x = (x ^ (x >> 31)).to(tl.int64, bitcast=True)
    tl.atomic_add(total_ptr, tl.sum(tl.where(at < W, x, 0)))
