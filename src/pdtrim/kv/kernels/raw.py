"""Kept pairs of a larger cache to the wire as they are: ``kv/codecs/raw.py`` without a copy before.

One launch, one program a tile of tokens of a head's keys or values.

Shapes: L heads, T tokens of the cache, M of them kept, D head width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdtrim.kv.kernels.launch import TILE, on, rows, source, tokens_of
from pdtrim.kv.kernels.numbers import EXACT, channels, load_side

if TYPE_CHECKING:
    from pdtrim.kv.codecs.raw import Raw


def takes(codec: Raw, tokens: int, width: int) -> bool:
    """Whether a token fits a tile, and where it lies in a head 32 bits."""
    return 1 <= width <= 1024 and tokens * width < 2**31 - TILE


def encode(codec: Raw, k_LTD: Tensor, v_LTD: Tensor, kept_LM: Tensor | None = None) -> Tensor:
    """The wire bytes, as :meth:`Raw.encode` makes them of the kept pairs."""
    k_LTD, v_LTD = rows(k_LTD), rows(v_LTD)
    L, M, D = *(k_LTD if kept_LM is None else kept_LM).shape[:2], k_LTD.shape[2]
    kv = torch.empty(2 * L * M * D, dtype=k_LTD.dtype, device=k_LTD.device)
    tiles = triton.cdiv(M, tokens_of(D))
    pointers, strides = source(k_LTD, v_LTD, kept_LM)
    if L * tiles:
        with on(kv.device):
            gather_kernel[(2 * L * tiles,)](
                *(*pointers, kv, M, tiles, *strides),
                **{"D": D, "BM": tokens_of(D), "KEPT": kept_LM is not None},
                **EXACT,
            )
    return kv.view(torch.uint8)


@triton.jit(do_not_specialize=["M", "tiles"], do_not_specialize_on_alignment=["kept_ptr"])
def gather_kernel(
    k_ptr, v_ptr, kept_ptr, to_ptr, M, tiles, k_head, k_row, v_head, v_row, kept_head, kept_row,
    D: tl.constexpr, BM: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """``BM`` pairs of a head; ``tiles`` of them a head, the values' behind the keys'."""
    pid = tl.program_id(0)
    m = pid % tiles * BM + tl.arange(0, BM)
    x = load_side(
        k_ptr, v_ptr, kept_ptr, tl.num_programs(0) // tiles // 2, pid // tiles,
        tl.minimum(m, M - 1), k_head, k_row, v_head, v_row, kept_head, kept_row, D, KEPT,
    )  # fmt: skip
    to = to_ptr + ((pid // tiles).to(tl.int64) * M + m)[:, None] * D + channels(D)[None, :]
    tl.store(to, x, mask=(m < M)[:, None])
