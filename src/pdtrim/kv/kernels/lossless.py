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

from pdtrim.kv.codecs.lossless import joined, plain_bytes, rest_bytes, rest_of, split
from pdtrim.kv.kernels import rans
from pdtrim.kv.kernels.launch import on

if TYPE_CHECKING:
    from pdtrim.kv.codecs.lossless import Lossless

BLOCK = 4096


def takes(codec: Lossless, tokens: int, width: int) -> bool:
    """Whether a head's tokens are whole rows of threads, and 32 bits count its elements."""
    return width % 8 == 0 and 8 <= width <= 256 and tokens * width < 2**28


def encode(codec: Lossless, k_LTD: Tensor, v_LTD: Tensor, kept_LM: Tensor | None = None) -> Tensor:
    """The wire bytes, as :meth:`Lossless.encode` makes them of the kept pairs."""
    if kept_LM is not None:
        at = kept_LM.to(torch.int64)[..., None].expand(-1, -1, k_LTD.shape[2])
        k_LTD, v_LTD = k_LTD.gather(1, at), v_LTD.gather(1, at)
    L, M, D = k_LTD.shape
    kv_2LMD = torch.stack((k_LTD, v_LTD))
    if kv_2LMD.dtype == torch.bfloat16:
        plain = torch.zeros(plain_bytes(kv_2LMD.numel(), torch.bfloat16), dtype=torch.uint8,
                            device=kv_2LMD.device)  # fmt: skip
        exponents = torch.empty(kv_2LMD.numel(), dtype=torch.int8, device=kv_2LMD.device)
        if kv_2LMD.numel():
            with on(kv_2LMD.device):
                split_kernel[(triton.cdiv(kv_2LMD.numel(), BLOCK),)](
                    kv_2LMD.view(torch.int16), exponents, plain, kv_2LMD.numel(), BLOCK=BLOCK
                )
    else:
        exponents, rest_n = split(kv_2LMD)
        plain = rest_bytes(rest_n, kv_2LMD.dtype)
    coded = rans.encode(exponents.view(2 * L, M, D), "exponent")
    before = len(plain) + len(coded.heads)
    data = torch.empty(before + 2 * coded.words(), dtype=torch.uint8, device=plain.device)
    torch.cat((plain, coded.heads), out=data[:before])
    coded.write(data[before:])
    return data


def decode(
    codec: Lossless, data: Tensor, heads: int, tokens: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, bool]:
    """Keys and values ``[L, M, D]``, and whether no encoder made the bytes."""
    L, M, D = heads, tokens, width
    plain, lanes, words = codec.parts(data, L, M, D, dtype)
    codes_PND, broken = rans.decode(lanes, words, (2 * L, M, D))
    if dtype == torch.bfloat16:
        kv_n = torch.empty(codes_PND.numel(), dtype=torch.int16, device=data.device)
        if kv_n.numel():
            with on(data.device):
                join_kernel[(triton.cdiv(kv_n.numel(), BLOCK),)](
                    codes_PND, plain, kv_n, kv_n.numel(), BLOCK=BLOCK
                )
    else:
        kv_n = joined(codes_PND.view(-1), rest_of(plain, codes_PND.numel(), dtype), dtype)
    k_LMD, v_LMD = kv_n.view(dtype).view(2, L, M, D)
    return k_LMD, v_LMD, bool(broken.item())


@triton.jit(do_not_specialize=["count"])
def split_kernel(x_ptr, exponents_ptr, plain_ptr, count, BLOCK: tl.constexpr):
    """Of bf16's bits the exponent less 128, and sign and mantissa."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(x_ptr + at, mask=at < count, other=0).to(tl.int32)
    tl.store(exponents_ptr + at, (((bits >> 7) & 255) - 128).to(tl.int8), mask=at < count)
    rest = ((bits >> 8) & 128) | (bits & 127)
    tl.store(plain_ptr + at, rest.to(tl.uint8), mask=at < count)


@triton.jit(do_not_specialize=["count"])
def join_kernel(exponents_ptr, plain_ptr, x_ptr, count, BLOCK: tl.constexpr):
    """The way back."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exponent = tl.load(exponents_ptr + at, mask=at < count, other=0).to(tl.int32) + 128
    rest = tl.load(plain_ptr + at, mask=at < count, other=0).to(tl.int32)
    bits = ((rest & 128) << 8) | (exponent << 7) | (rest & 127)
    tl.store(x_ptr + at, bits.to(tl.int16), mask=at < count)
