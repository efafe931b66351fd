"""``kv/codecs/fp8.py`` on a GPU: largest magnitudes, then codes; and back in one launch.

A head's scale needs all its pairs, so that encoding reads them twice, the second time from the
caches where a head fits there. e4m3 is made and read by integers: GPUs before the fp8 ones code as
well, and the interpreter rounds its conversions wrongly.

Shapes: Y layers, L heads, T tokens of the cache, M of them kept, D head width, S bytes of room.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdtrim.kv.kernels import ALIGNED
from pdtrim.kv.kernels.launch import (
    TILE,
    Pairs,
    decoded,
    encoded,
    on,
    shape_of,
    source,
    threads,
    tokens_of,
)
from pdtrim.kv.kernels.numbers import (
    EXACT,
    GREATEST_FP16,
    LEAST_SCALE,
    channels,
    fp16_below,
    inverse_of,
    layer_of,
    load_side,
    quotient,
    store_side,
    widened,
)

if TYPE_CHECKING:
    from pdtrim.kv.codecs.fp8 import Fp8

RUN = 8
"""Tiles of a head that a program seeks the largest magnitude of."""
PEAKS = tl.constexpr(256)
LARGEST = tl.constexpr(448.0)
LEAST_NORMAL = tl.constexpr(2.0**-6)
STEPS = tl.constexpr(2.0**14)
"""Added to a number below 2**-6 in fp32, it leaves its multiple of 2**-9 in the low bits."""


def takes(codec: Fp8, tokens: int, width: int) -> bool:
    """Whether a token fits a tile, and where it lies in a head 32 bits."""
    return 1 <= width <= 1024 and tokens * width < 2**31 - TILE


def encode(codec: Fp8, k_LTD: Tensor, v_LTD: Tensor, kept_LM: Tensor | None = None) -> Tensor:
    """The wire bytes, as :meth:`Fp8.encode` makes them of the kept pairs."""
    return encoded(encode_layers, codec, k_LTD, v_LTD, kept_LM)


def encode_layers(codec: Fp8, kv: Pairs, kept_YLM: Tensor | None, room_YS: Tensor) -> None:
    """The same of alike layers, each into the begin of a row."""
    Y, L, M, D = shape_of(kv, kept_YLM)
    if L * M == 0:
        return
    pointers, strides, kept = source(kv, kept_YLM)
    constants = {"D": D, "BM": tokens_of(D), **kept, **threads(TILE)}
    tiles = triton.cdiv(M, tokens_of(D))
    runs = triton.cdiv(tiles, RUN)
    peaks = torch.empty(Y * 2 * L * runs, dtype=torch.int32, device=room_YS.device)
    with on(room_YS.device):
        peak_kernel[(Y * 2 * L * runs,)](
            *(*pointers, peaks, M, L, runs, *strides), **constants, RUN=RUN, **EXACT
        )
        code_kernel[(Y * 2 * L * tiles,)](
            *(*pointers, peaks, *_parts(room_YS, L), M, L, tiles, runs),
            *(room_YS.stride(0) // ALIGNED, *strides),
            **constants,
            **EXACT,
        )


def decode(
    codec: Fp8, data: Tensor, heads: int, tokens: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values ``[L, M, D]``, and int32 ``[1]``, not 0 where one is broken."""
    return decoded(decode_layers, codec, data, (heads, tokens, width), dtype)


def decode_layers(codec: Fp8, data_YS: Tensor, kv: Pairs, kept_YLM: Tensor | None) -> Tensor:
    """The begin of each row into alike layers, and ``broken`` of them all."""
    Y, L, M, D = shape_of(kv, kept_YLM)
    broken = torch.zeros(1, dtype=torch.int32, device=data_YS.device)
    if L * M == 0:
        return broken
    pointers, strides, kept = source(kv, kept_YLM)
    tiles = triton.cdiv(M, tokens_of(D))
    with on(data_YS.device):
        decode_kernel[(Y * 2 * L * tiles,)](
            *(*_parts(data_YS, L), *pointers, broken, M, L, tiles),
            *(data_YS.stride(0) // ALIGNED, *strides),
            **{"D": D, "BM": tokens_of(D), **kept},
            **threads(TILE),
            **EXACT,
        )
    return broken


def _parts(data_YS: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """The first layer's scales and codes."""
    return data_YS[0, : 4 * heads].view(torch.float16), data_YS[0, 4 * heads :]


SCALARS = ["M", "heads", "tiles", "runs", "room", "kept_layer"]


@triton.jit(do_not_specialize=SCALARS, do_not_specialize_on_alignment=["kept_ptr"])
def peak_kernel(
    k_ptr, v_ptr, kept_ptr, apart_ptr, peak_ptr, M, heads, runs,
    k_head, k_row, v_head, v_row, kept_head, kept_row, kept_layer,
    D: tl.constexpr, BM: tl.constexpr, KEPT: tl.constexpr, MANY: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """int32 bits of the largest magnitude of ``RUN`` tiles, which order as the numbers do."""
    pid = tl.program_id(0)
    side = pid // runs % (2 * heads)
    layer, layers = pid // runs // (2 * heads), tl.num_programs(0) // runs // (2 * heads)
    k_ptr, v_ptr, kept_ptr = layer_of(
        k_ptr, v_ptr, kept_ptr, apart_ptr, layer, layers, kept_layer, KEPT, MANY
    )
    peak = tl.zeros([BM, triton.next_power_of_2(D)], tl.int32)
    for tile in range(RUN):
        m = tl.minimum((pid % runs * RUN + tile) * BM + tl.arange(0, BM), M - 1)
        x = load_side(
            k_ptr, v_ptr, kept_ptr, heads, side, m,
            k_head, k_row, v_head, v_row, kept_head, kept_row, D, KEPT,
        )  # fmt: skip
        peak = tl.maximum(peak, widened(x).to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.store(peak_ptr + pid, tl.max(tl.max(peak, axis=1), axis=0))


@triton.jit(do_not_specialize=SCALARS, do_not_specialize_on_alignment=["kept_ptr"])
def code_kernel(
    k_ptr, v_ptr, kept_ptr, apart_ptr, peak_ptr, scale_ptr, code_ptr, M, heads, tiles, runs, room,
    k_head, k_row, v_head, v_row, kept_head, kept_row, kept_layer,
    D: tl.constexpr, BM: tl.constexpr, KEPT: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """Codes of ``BM`` pairs, by the scale of the head's ``runs`` magnitudes."""
    pid = tl.program_id(0)
    side, tile = pid // tiles % (2 * heads), pid % tiles
    layer, layers = pid // tiles // (2 * heads), tl.num_programs(0) // tiles // (2 * heads)
    k_ptr, v_ptr, kept_ptr = layer_of(
        k_ptr, v_ptr, kept_ptr, apart_ptr, layer, layers, kept_layer, KEPT, MANY
    )
    peak_ptr += layer * (2 * heads * runs)
    scale_ptr += layer.to(tl.int64) * room * 8
    code_ptr += layer.to(tl.int64) * room * 16
    m = tile * BM + tl.arange(0, BM)
    x = load_side(
        k_ptr, v_ptr, kept_ptr, heads, side, tl.minimum(m, M - 1),
        k_head, k_row, v_head, v_row, kept_head, kept_row, D, KEPT,
    )  # fmt: skip
    peak = tl.zeros([PEAKS], tl.int32)
    for start in range(0, runs, PEAKS):
        at = start + tl.arange(0, PEAKS)
        peak = tl.maximum(peak, tl.load(peak_ptr + side * runs + at, mask=at < runs, other=0))
    # one number as a tile, because it is divided and compared as the tiles are
    peak = tl.max(peak, axis=0) + tl.zeros([1], tl.int32)
    scale = _scale(peak.to(tl.float32, bitcast=True))
    if tile == 0:
        tl.store(scale_ptr + side + tl.arange(0, 1), scale.to(tl.float16))
    x = widened(x)
    # the quotient loses the sign of a zero
    sign = x.to(tl.int32, bitcast=True) >> 24 & 0x80
    codes = sign | _e4m3(quotient(x, scale[:, None], inverse_of(scale)[:, None]))
    to = code_ptr + (side.to(tl.int64) * M + m)[:, None] * D + channels(D)[None, :]
    tl.store(to, codes.to(tl.uint8), mask=(m < M)[:, None])


@triton.jit(do_not_specialize=SCALARS, do_not_specialize_on_alignment=["kept_ptr"])
def decode_kernel(
    scale_ptr, code_ptr, k_ptr, v_ptr, kept_ptr, apart_ptr, broken_ptr, M, heads, tiles, room,
    k_head, k_row, v_head, v_row, kept_head, kept_row, kept_layer,
    D: tl.constexpr, BM: tl.constexpr, KEPT: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """``BM`` pairs of a head."""
    pid = tl.program_id(0)
    side, tile = pid // tiles % (2 * heads), pid % tiles
    layer, layers = pid // tiles // (2 * heads), tl.num_programs(0) // tiles // (2 * heads)
    k_ptr, v_ptr, kept_ptr = layer_of(
        k_ptr, v_ptr, kept_ptr, apart_ptr, layer, layers, kept_layer, KEPT, MANY
    )
    scale = tl.load(scale_ptr + layer.to(tl.int64) * room * 8 + side).to(tl.float32)
    m = tile * BM + tl.arange(0, BM)
    at = (side.to(tl.int64) * M + m)[:, None] * D + channels(D)[None, :]
    code_ptr += layer.to(tl.int64) * room * 16
    code = tl.load(code_ptr + at, mask=(m < M)[:, None], other=0).to(tl.int32)
    sound = (scale > 0) & (scale <= GREATEST_FP16)
    no_number = tl.max(tl.max(((code & 0x7F) == 0x7F).to(tl.int32), axis=1), axis=0)
    if (no_number > 0) | (sound == 0):
        tl.store(broken_ptr, 1)
    # moved up by seven bits, the code is the fp16 of its value over 2**8
    half = ((code & 0x80) << 8 | (code & 0x7F) << 7).to(tl.int16).to(tl.float16, bitcast=True)
    x = half.to(tl.float32) * (scale * 256.0)
    store_side(
        k_ptr, v_ptr, kept_ptr, heads, side, m, x, m < M,
        k_head, k_row, v_head, v_row, kept_head, kept_row, D, KEPT,
    )  # fmt: skip


@triton.jit
def _scale(peak):
    """fp32 of ``fp16_scale`` of a magnitude over the largest e4m3."""
    exact = tl.div_rn(peak, tl.full(peak.shape, LARGEST, tl.float32))
    near = tl.where(exact < LEAST_SCALE, LEAST_SCALE, exact).to(tl.float16).to(tl.float32)
    above = -fp16_below(-exact).to(tl.float32)
    return tl.where(exact > near * (1 + 2.0**-8), above, near)


@triton.jit
def _e4m3(x):
    """int32 codes of the magnitudes of fp32, rounded to even; beyond the largest the largest."""
    size = tl.minimum(tl.abs(x), LARGEST)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = (size + STEPS).to(tl.int32, bitcast=True) & 0xF
    return tl.where(size < LEAST_NORMAL, small, normal)
