"""Every bit kept, fewer bytes: exponents at about their entropy, signs and mantissas as they are.

The exponents of one channel spread over a few octaves, of which the middle ones are usual:
``codecs/rans.py`` has tables for just that. Sign and mantissa are near noise.

Papers: the exponent's low entropy is that of DFloat11 (arXiv 2504.11651) and SplitZip (2605.01708).
Different from both: no code book is counted or sent, as exponents of normal numbers have the same
odds in every channel but for their mean.

Bytes: signs and mantissas of ``[2, L, M, D]``: whole bytes, little-endian, then fp16's upper three
bits, eight in three bytes, and up to one byte of zeros to end on an even number; heads and words of
the exponents less 128 ``[2 L, M, D]``.

Shapes: L heads, M tokens, D head width, n elements of keys and values.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import model_validator
from torch import Tensor

from pdtrim.errors import WireError
from pdtrim.kv.codecs import rans
from pdtrim.kv.codecs.base import CodecBase
from pdtrim.kv.codecs.integer import pack, unpack
from pdtrim.kv.kernels import kernels_of, refuse


class FloatBits(NamedTuple):
    """Of a float's bits: an integer type of its size, its mantissa's bits and its exponent's."""

    bits: torch.dtype
    mantissa: int
    exponent: int


LAYOUTS = {
    torch.bfloat16: FloatBits(torch.int16, 7, 8),
    torch.float16: FloatBits(torch.int16, 10, 5),
    torch.float32: FloatBits(torch.int32, 23, 8),
}


class Lossless(CodecBase):
    """Bit-exact keys and values."""

    name: Literal["lossless"] = "lossless"

    exact: ClassVar[bool] = True
    largest: ClassVar[float] = math.inf
    variable: ClassVar[bool] = True
    presets: ClassVar[str] = "lossless"
    kernels: ClassVar[str | None] = "lossless"
    no_code: ClassVar[str] = "lossless KV holds codes that no encoder makes"

    @model_validator(mode="before")
    @classmethod
    def _without_level(cls, data: Any) -> Any:
        """Earlier plans hold zstandard's level, which has no meaning here."""
        return {k: v for k, v in data.items() if k != "level"} if isinstance(data, dict) else data

    def encode(self, k_LMD: Tensor, v_LMD: Tensor) -> Tensor:
        """See the base class."""
        L, M, D = k_LMD.shape
        if kernels := kernels_of(self, k_LMD.device, M, D):
            return kernels.encode(self, k_LMD, v_LMD)
        exponents_n, rest_n = split(torch.stack((k_LMD, v_LMD)).cpu())
        coded = rans.encode(exponents_n.view(2 * L, M, D), "exponent")
        plain = rest_bytes(rest_n, k_LMD.dtype)
        return torch.cat((plain, *(x.reshape(-1) for x in coded))).to(k_LMD.device)

    def decode(
        self, data: Tensor, heads: int, tokens: int, width: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """See the base class."""
        L, M, D = heads, tokens, width
        if kernels := kernels_of(self, data.device, M, D):
            k_LMD, v_LMD, broken = kernels.decode(self, data, L, M, D, dtype)
            refuse(broken, self.no_code)
            return k_LMD, v_LMD
        plain, lanes, words = self.parts(data.cpu(), L, M, D, dtype)
        codes_PND = rans.decode(lanes, words, (2 * L, M, D))
        rest_n = rest_of(plain, codes_PND.numel(), dtype)
        kv_2LMD = joined(codes_PND.reshape(-1), rest_n, dtype).view(2, L, M, D).to(data.device)
        return kv_2LMD[0], kv_2LMD[1]

    def parts(
        self, data: Tensor, heads: int, tokens: int, width: int, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """Plain bytes, heads of lanes and words, each from an aligned address.

        Raises:
            WireError: too few bytes for the parts before the words.
        """
        return rans.cut(data, self._plain_sizes(heads, tokens, width, dtype), self.name)

    def nbytes(self, heads: int, tokens: int, width: int, dtype: torch.dtype) -> int:
        """See the base class."""
        words = rans.most_bytes(2 * heads, tokens, width)
        return sum(self._plain_sizes(heads, tokens, width, dtype)) + words

    def _plain_sizes(self, heads: int, tokens: int, width: int, dtype: torch.dtype) -> list[int]:
        return [
            plain_bytes(2 * heads * tokens * width, dtype),
            rans.head_bytes(2 * heads, tokens, width),
        ]

    def round_trip(self, k_LMD: Tensor, v_LMD: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing changes, so nothing is copied."""
        return k_LMD, v_LMD


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Exponents less 128 as int8, and int32 of sign and mantissa, the sign above; both 1-D."""
    kind, mantissa, exponent = LAYOUTS[x.dtype]
    bits = x.contiguous().view(-1).view(kind).to(torch.int32)
    exponents = (bits >> mantissa & (1 << exponent) - 1) - 128
    sign = bits >> mantissa + exponent & 1
    return exponents.to(torch.int8), sign << mantissa | bits & (1 << mantissa) - 1


def joined(exponents_n: Tensor, rest_n: Tensor, dtype: torch.dtype) -> Tensor:
    """The floats that :func:`split` took apart.

    Raises:
        WireError: an exponent that the dtype does not have.
    """
    kind, mantissa, exponent = LAYOUTS[dtype]
    wide = exponents_n.to(torch.int32) + 128
    if wide.numel() and int(wide.max()) >> exponent:
        raise WireError("lossless KV holds an exponent that its dtype does not have")
    sign = rest_n >> mantissa << mantissa + exponent
    bits = sign | wide << mantissa | rest_n & (1 << mantissa) - 1
    return bits.to(kind).view(dtype)


def plain_bytes(elements: int, dtype: torch.dtype) -> int:
    """Bytes of signs and mantissas: an even number."""
    whole, loose = divmod(LAYOUTS[dtype].mantissa + 1, 8)
    size = whole * elements + loose * -(-elements // 8)
    return size + size % 2


def rest_bytes(rest_n: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 of signs and mantissas."""
    whole, loose = divmod(LAYOUTS[dtype].mantissa + 1, 8)
    data = rest_n.new_zeros(plain_bytes(len(rest_n), dtype), dtype=torch.uint8)
    wide = rest_n.view(torch.uint8).view(-1, 4)
    end = whole * len(rest_n)
    data[:end].view(-1, whole)[:] = wide[:, :whole]
    if loose:
        packed = pack(wide[:, whole].contiguous(), loose)
        data[end : end + len(packed)] = packed
    return data


def rest_of(data: Tensor, elements: int, dtype: torch.dtype) -> Tensor:
    """int32 of what :func:`rest_bytes` made."""
    whole, loose = divmod(LAYOUTS[dtype].mantissa + 1, 8)
    wide = data.new_zeros(elements, 4)
    end = whole * elements
    wide[:, :whole] = data[:end].view(-1, whole)
    if loose:
        size = loose * -(-elements // 8)
        wide[:, whole] = unpack(data[end : end + size], loose, elements)
    return wide.view(torch.int32).view(-1)
