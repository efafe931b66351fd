"""What the integer codecs run on a GPU: sizes of tiles, and the launches.

Shapes: Y layers, L heads, T tokens of the cache, M of them kept, N coded, D head width, S bytes of
room.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from pdtrim.kv.kernels import ALIGNED
from pdtrim.kv.kernels.integer_decode import decode_kernel
from pdtrim.kv.kernels.integer_encode import encode_kernel
from pdtrim.kv.kernels.launch import (
    Pairs,
    decoded,
    encoded,
    on,
    shape_of,
    source,
    threads,
    tokens_of,
)
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
    return encoded(encode_layers, codec, k_LTD, v_LTD, kept_LM)


def encode_layers(codec: Integer, kv: Pairs, kept_YLM: Tensor | None, room_YS: Tensor) -> None:
    """The same of alike layers, each into the begin of a row."""
    Y, L, M, D = shape_of(kv, kept_YLM)
    plan, dtype = _Tiles(codec, M, D), kv[0][0].dtype
    tiles = plan.groups + plan.v_tiles + plan.end_tiles
    if L * tiles == 0:
        return
    pointers, strides, constants = source(kv, kept_YLM)
    with on(room_YS.device):
        encode_kernel[(Y * L * tiles,)](
            *(*pointers, *_parts(codec, room_YS, L, M, D, dtype)),
            *(plan.coded, tiles, plan.groups, plan.v_tiles, plan.first, plan.last, plan.size),
            *(L, room_YS.stride(0) // ALIGNED, *strides),
            **plan.constants(codec, D),
            **{"CHUNKS": plan.chunks, **constants},
            **threads(plan.elements),
            **EXACT,
        )


def decode(
    codec: Integer, data: Tensor, heads: int, tokens: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values ``[L, M, D]``, and int32 ``[1]``, not 0 where a grid is broken."""
    return decoded(decode_layers, codec, data, (heads, tokens, width), dtype)


def decode_layers(codec: Integer, data_YS: Tensor, kv: Pairs, kept_YLM: Tensor | None) -> Tensor:
    """The begin of each row into alike layers, and ``broken`` of them all."""
    Y, L, M, D = shape_of(kv, kept_YLM)
    plan, dtype = _Tiles(codec, M, D), kv[0][0].dtype
    k_tiles = plan.groups * plan.chunks
    tiles = k_tiles + plan.v_tiles + plan.end_tiles
    broken = torch.zeros(1, dtype=torch.int32, device=data_YS.device)
    if L * tiles == 0:
        return broken
    pointers, strides, constants = source(kv, kept_YLM)
    with on(data_YS.device):
        decode_kernel[(Y * L * tiles,)](
            *(*_parts(codec, data_YS, L, M, D, dtype), *pointers, broken),
            *(plan.coded, tiles, k_tiles, plan.v_tiles, plan.first, plan.last, plan.size),
            *(L, data_YS.stride(0) // ALIGNED, plan.groups, *strides),
            **plan.constants(codec, D),
            **constants,
            **threads(plan.elements),
            **EXACT,
        )
    return broken


def _parts(
    codec: Integer, data_YS: Tensor, heads: int, tokens: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """The first layer's bytes: raw ends, grids of keys and of values, codes of both."""
    sizes = codec.sizes(heads, tokens, width, dtype)
    ends, k_grid, v_grid, k_codes, v_codes = data_YS[0, : sum(sizes)].split(sizes)
    return (
        ends.view(dtype),
        k_grid.view(torch.float16),
        v_grid.view(torch.float16),
        k_codes,
        v_codes,
    )


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
