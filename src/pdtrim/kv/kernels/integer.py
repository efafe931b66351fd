"""What the integer codecs run on a GPU: sizes of tiles, and the launches.

Shapes: L heads, T tokens of the cache, M of them kept, N coded, D head width, J groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from pdtrim.kv.kernels.integer_decode import decode_kernel
from pdtrim.kv.kernels.integer_encode import encode_kernel
from pdtrim.kv.kernels.launch import aligned, on, rows, source, threads, tokens_of
from pdtrim.kv.kernels.numbers import EXACT

if TYPE_CHECKING:
    from pdtrim.kv.codecs.integer import Integer


def takes(codec: Integer, tokens: int, width: int) -> bool:
    """Whether a token's codes are whole bytes, a token fits a tile, and a head's bits 32 bits."""
    power = width & (width - 1) == 0
    fits = width % 8 == 0 and 8 <= width <= 256 and tokens * width < 2**28
    return fits and (power or not codec.rotate)


def encode(codec: Integer, k_LTD: Tensor, v_LTD: Tensor, kept_LM: Tensor | None = None) -> Tensor:
    """The wire bytes, as :meth:`Integer.encode` makes them of the kept pairs."""
    k_LTD, v_LTD = rows(k_LTD), rows(v_LTD)
    L, M, D = *(k_LTD if kept_LM is None else kept_LM).shape[:2], k_LTD.shape[2]
    plan = _Tiles(codec, M, D)
    sizes = codec.sizes(L, M, D, k_LTD.dtype)
    data = torch.empty(sum(sizes), dtype=torch.uint8, device=k_LTD.device)
    ends, k_grid, v_grid, k_codes, v_codes = data.split(sizes)
    tiles = plan.groups + plan.v_tiles + plan.end_tiles
    if L * tiles == 0:
        return data
    pointers, strides = source(k_LTD, v_LTD, kept_LM)
    with on(data.device):
        encode_kernel[(L * tiles,)](
            *(*pointers, ends.view(k_LTD.dtype)),
            *(k_grid.view(torch.float16), v_grid.view(torch.float16), k_codes, v_codes),
            *(plan.coded, tiles, plan.groups, plan.v_tiles, plan.first, plan.last, plan.size),
            *strides,
            **plan.constants(codec, D),
            **{"CHUNKS": plan.chunks, "KEPT": kept_LM is not None},
            **threads(plan.elements),
            **EXACT,
        )
    return data


def decode(
    codec: Integer, data: Tensor, heads: int, tokens: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values ``[L, M, D]``, and int32 ``[1]``, not 0 where a grid is broken."""
    L, M, D = heads, tokens, width
    plan = _Tiles(codec, M, D)
    k_LMD, v_LMD = torch.empty(2, L, M, D, dtype=dtype, device=data.device)
    k_tiles = plan.groups * plan.chunks
    tiles = k_tiles + plan.v_tiles + plan.end_tiles
    if L * tiles == 0:
        return k_LMD, v_LMD, torch.zeros(1, dtype=torch.int32, device=data.device)
    ends, k_grid, v_grid, k_codes, v_codes = aligned(data).split(codec.sizes(L, M, D, dtype))
    broken = torch.zeros(1, dtype=torch.int32, device=data.device)
    with on(data.device):
        decode_kernel[(L * tiles,)](
            *(ends.view(dtype), k_grid.view(torch.float16), v_grid.view(torch.float16)),
            *(k_codes, v_codes, k_LMD, v_LMD, broken),
            *(plan.coded, tiles, k_tiles, plan.v_tiles, plan.first, plan.last, plan.size),
            plan.groups,
            **plan.constants(codec, D),
            **threads(plan.elements),
            **EXACT,
        )
    return k_LMD, v_LMD, broken


class _Tiles:
    """How ``tokens`` of a head are cut into tiles."""

    def __init__(self, codec: Integer, tokens: int, width: int) -> None:
        start, stop = codec.coded(tokens)
        self.coded, self.first, self.last = stop - start, start, tokens - stop
        wide = triton.next_power_of_2(width)
        self.size = max(1, min(codec.group, self.coded))  # tokens of a group of keys
        self.groups = triton.cdiv(self.coded, self.size)
        # two of a head's tiles of 64 tokens, where a group is that long
        self.k_rows = min(triton.next_power_of_2(max(self.size, 16)), 2 * tokens_of(width))
        self.chunks = triton.cdiv(self.size, self.k_rows)
        self.v_rows = max(tokens_of(width), self.k_rows)
        self.v_tiles = triton.cdiv(self.coded, self.v_rows)
        self.end_tiles = triton.cdiv(self.first + self.last, self.v_rows)
        self.elements = wide * self.v_rows

    def constants(self, codec: Integer, width: int) -> dict[str, int | bool]:
        """What the kernels are compiled for."""
        return {
            "D": width,
            "STAGES": width.bit_length() - 1 if codec.rotate else 0,
            "K_BITS": codec.k_bits,
            "V_BITS": codec.v_bits,
            "GROUP": min(codec.group, width),
            "BT": self.k_rows,
            "BV": self.v_rows,
        }
