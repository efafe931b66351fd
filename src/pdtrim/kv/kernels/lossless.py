"""What the lossless codec runs on a GPU: bf16 taken apart and joined, and ``kernels/rans.py``.

Other dtypes are taken apart by torch, on the GPU too.

Shapes: L heads, M tokens, D head width, n elements of keys and values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdtrim.kv.codecs.base import kept_of
from pdtrim.kv.codecs.lossless import joined, plain_bytes, rest_bytes, rest_of, split
from pdtrim.kv.kernels import rans
from pdtrim.kv.kernels.launch import on, rows, source, tokens_of
from pdtrim.kv.kernels.numbers import channels, load_side

if TYPE_CHECKING:
    from pdtrim.kv.codecs.lossless import Lossless

ROWS = 512
"""Of eight elements, a program."""


takes = rans.takes


def encode(codec: Lossless, k_LTD: Tensor, v_LTD: Tensor, kept_LM: Tensor | None = None) -> Tensor:
    """The wire bytes, as :meth:`Lossless.encode` makes them of the kept pairs."""
    k_LTD, v_LTD = rows(k_LTD), rows(v_LTD)
    L, M, D = *(k_LTD if kept_LM is None else kept_LM).shape[:2], k_LTD.shape[2]
    elements, tile = 2 * L * M * D, tokens_of(D)
    if k_LTD.dtype == torch.bfloat16:
        size = plain_bytes(elements, torch.bfloat16)
        plain = torch.empty(size, dtype=torch.uint8, device=k_LTD.device)
        exponents = torch.empty(elements, dtype=torch.int8, device=k_LTD.device)
        if elements:
            kept_YLM = None if kept_LM is None else kept_LM[None]
            (*pointers, _), strides, _ = source([(k_LTD, v_LTD)], kept_YLM)
            with on(k_LTD.device):
                split_kernel[(2 * L * triton.cdiv(M, tile),)](
                    *pointers, exponents, plain, M, triton.cdiv(M, tile), *strides[:6],
                    D=D, ROWS=tile, KEPT=kept_LM is not None,
                )  # fmt: skip
    else:
        if kept_LM is not None:
            k_LTD, v_LTD = kept_of(k_LTD, kept_LM), kept_of(v_LTD, kept_LM)
        exponents, rest_n = split(torch.stack((k_LTD, v_LTD)))
        plain = rest_bytes(rest_n, k_LTD.dtype)
    coded = rans.encode(exponents.view(2 * L, M, D), "exponent")
    return coded.after((plain,), codec.nbytes(L, M, D, k_LTD.dtype))


def decode(
    codec: Lossless, data: Tensor, heads: int, tokens: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values ``[L, M, D]``, and int32 ``[1]``, not 0 where no encoder made the bytes."""
    L, M, D = heads, tokens, width
    plain, lanes, words = codec.parts(data, L, M, D, dtype)
    codes_PND, broken = rans.decode(lanes, words, (2 * L, M, D))
    if dtype == torch.bfloat16:
        kv_n = torch.empty(codes_PND.numel(), dtype=torch.int16, device=data.device)
        if kv_n.numel():
            with on(data.device):
                join_kernel[(triton.cdiv(kv_n.numel() // 8, ROWS),)](
                    codes_PND, plain, kv_n, kv_n.numel() // 8, ROWS=ROWS
                )
    else:
        kv_n = joined(codes_PND.view(-1), rest_of(plain, codes_PND.numel(), dtype), dtype)
    k_LMD, v_LMD = kv_n.view(dtype).view(2, L, M, D)
    return k_LMD, v_LMD, broken


@triton.jit(do_not_specialize=["M", "tiles"], do_not_specialize_on_alignment=["kept_ptr"])
def split_kernel(
    k_ptr, v_ptr, kept_ptr, exponents_ptr, plain_ptr, M, tiles,
    k_head, k_row, v_head, v_row, kept_head, kept_row,
    D: tl.constexpr, ROWS: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Of bf16's bits the exponent less 128, and sign and mantissa."""
    pid = tl.program_id(0)
    m = pid % tiles * ROWS + tl.arange(0, ROWS)
    x = load_side(
        k_ptr, v_ptr, kept_ptr, tl.num_programs(0) // tiles // 2, pid // tiles,
        tl.minimum(m, M - 1), k_head, k_row, v_head, v_row, kept_head, kept_row, D, KEPT,
    )  # fmt: skip
    bits = x.to(tl.int16, bitcast=True).to(tl.int32)
    at = ((pid // tiles).to(tl.int64) * M + m)[:, None] * D + channels(D)[None, :]
    ok = (m < M)[:, None]
    tl.store(exponents_ptr + at, (((bits >> 7) & 255) - 128).to(tl.int8), mask=ok)
    tl.store(plain_ptr + at, (((bits >> 8) & 128) | (bits & 127)).to(tl.uint8), mask=ok)


@triton.jit(do_not_specialize=["rows"])
def join_kernel(exponents_ptr, plain_ptr, x_ptr, rows, ROWS: tl.constexpr):
    """The way back."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at, ok = row[:, None] * 8 + tl.arange(0, 8)[None, :], (row < rows)[:, None]
    exponent = tl.load(exponents_ptr + at, mask=ok, other=0).to(tl.int32) + 128
    rest = tl.load(plain_ptr + at, mask=ok, other=0).to(tl.int32)
    bits = ((rest & 128) << 8) | (exponent << 7) | (rest & 127)
    tl.store(x_ptr + at, bits.to(tl.int16), mask=ok)
