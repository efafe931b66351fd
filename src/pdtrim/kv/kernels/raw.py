"""Kept pairs to the wire as they are, and back: ``kv/codecs/raw.py`` without a copy in between.

One launch each way, one program a tile of tokens of a head's keys or values.

Shapes: Y layers, L heads, T tokens of the cache, M of them kept, D head width, S bytes of room.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdtrim.kv.kernels import ALIGNED
from pdtrim.kv.kernels.launch import TILE, Pairs, encoded, on, shape_of, source, tokens_of
from pdtrim.kv.kernels.numbers import EXACT, channels, layer_of, load_side, store_side

if TYPE_CHECKING:
    from pdtrim.kv.codecs.raw import Raw


def takes(codec: Raw, tokens: int, width: int) -> bool:
    """Whether a token fits a tile, and where it lies in a head 32 bits."""
    return 1 <= width <= 1024 and tokens * width < 2**31 - TILE


def encode(codec: Raw, k_LTD: Tensor, v_LTD: Tensor, kept_LM: Tensor | None = None) -> Tensor:
    """The wire bytes, as :meth:`Raw.encode` makes them of the kept pairs."""
    return encoded(encode_layers, codec, k_LTD, v_LTD, kept_LM)


def encode_layers(codec: Raw, kv: Pairs, kept_YLM: Tensor | None, room_YS: Tensor) -> None:
    """The same of alike layers, each into the begin of a row."""
    _move(codec, kv, kept_YLM, room_YS, False)


def decode_layers(codec: Raw, data_YS: Tensor, kv: Pairs, kept_YLM: Tensor | None) -> Tensor:
    """The begin of each row into alike layers; no bytes are broken."""
    _move(codec, kv, kept_YLM, data_YS, True)
    return torch.zeros(1, dtype=torch.int32, device=data_YS.device)


def _move(codec: Raw, kv: Pairs, kept_YLM: Tensor | None, data_YS: Tensor, back: bool) -> None:
    Y, L, M, D = shape_of(kv, kept_YLM)
    dtype = kv[0][0].dtype
    data = data_YS[0, : codec.nbytes(L, M, D, dtype)].view(dtype)
    tiles = triton.cdiv(M, tokens_of(D))
    pointers, strides, constants = source(kv, kept_YLM)
    if L * tiles:
        with on(data_YS.device):
            move_kernel[(Y * 2 * L * tiles,)](
                *(*pointers, data, M, L, tiles, data_YS.stride(0) // ALIGNED, *strides),
                **{"D": D, "BM": tokens_of(D), "BACK": back, **constants},
                **EXACT,
            )


@triton.jit(
    do_not_specialize=["M", "heads", "tiles", "room", "kept_layer"],
    do_not_specialize_on_alignment=["kept_ptr"],
)
def move_kernel(
    k_ptr, v_ptr, kept_ptr, apart_ptr, data_ptr, M, heads, tiles, room,
    k_head, k_row, v_head, v_row, kept_head, kept_row, kept_layer,
    D: tl.constexpr, BM: tl.constexpr, KEPT: tl.constexpr, MANY: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """``BM`` pairs of a head; ``tiles`` of them a head, the values' behind the keys'."""
    pid = tl.program_id(0)
    side = pid // tiles % (2 * heads)
    layer, layers = pid // tiles // (2 * heads), tl.num_programs(0) // tiles // (2 * heads)
    k_ptr, v_ptr, kept_ptr = layer_of(
        k_ptr, v_ptr, kept_ptr, apart_ptr, layer, layers, kept_layer, KEPT, MANY
    )
    m = pid % tiles * BM + tl.arange(0, BM)
    data_ptr += layer.to(tl.int64) * room * (128 // data_ptr.dtype.element_ty.primitive_bitwidth)
    at = data_ptr + (side.to(tl.int64) * M + m)[:, None] * D + channels(D)[None, :]
    if BACK:
        store_side(
            k_ptr, v_ptr, kept_ptr, heads, side, m, tl.load(at, mask=(m < M)[:, None]), m < M,
            k_head, k_row, v_head, v_row, kept_head, kept_row, D, KEPT,
        )  # fmt: skip
    else:
        x = load_side(
            k_ptr, v_ptr, kept_ptr, heads, side, tl.minimum(m, M - 1),
            k_head, k_row, v_head, v_row, kept_head, kept_row, D, KEPT,
        )  # fmt: skip
        tl.store(at, x, mask=(m < M)[:, None])
