"""Two to eight bits an element: keys a channel, values a token, both ends of the prompt raw.

In each group ``lo = min``, ``scale = (max - lo) / (2**bits - 1)``, ``code = round((x - lo) /
scale)``, ``x' = lo + scale * code``: the error is at most ``scale / 2``. A key group is one channel
over ``group`` tokens, because a key's outliers sit in a few fixed channels; a value group is one
token over at most ``group`` channels, because a value's do not. The first ``first`` tokens
(attention sinks) and the ``recent`` last ones stay in the model's dtype.

Papers: KIVI (arXiv 2402.02750) for the two directions and the recent window, KVQuant (2401.18079)
for the raw sinks, QuaRot (2404.00456) and TurboQuant (2504.19874) for ``rotate``, a Hadamard
transform of each pair along the head width. Different from KIVI: coded once, at the handover, and
what decode adds is never coded; groups start at the first coded token and the last one may be
short. Different from TurboQuant: a uniform grid and no residual bit.

``lo`` and ``scale`` travel in fp16, ``lo`` rounded down and ``scale`` up so that the grid still
covers the group, and the codes are those of the rounded grid. Elements beyond fp16's range clip.

Bytes, K before V in each part: raw ends ``[2, L, R, D]``; fp16 grids ``[2, L, D, J of N]`` and
``[2, L, N, J of D]``, all lo before all scale; codes ``[L, D, N]`` and ``[L, N, D]``, eight
codes in ``bits`` bytes, the earlier code in the lower bits.

Shapes: L heads, M tokens, N of them coded and R raw, D head width, J groups; ``*`` any leading
shape.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from pdtrim.errors import WireError
from pdtrim.kv.codecs.base import CodecBase
from pdtrim.kv.codecs.hadamard import hadamard

Bits = Literal[2, 3, 4, 8]


class Integer(CodecBase):
    """``k_bits`` a key element and ``v_bits`` a value element, and an fp16 grid a group."""

    name: Literal["int"] = "int"
    k_bits: Bits = 4
    v_bits: Bits = 4
    group: int = Field(default=64, ge=1)
    first: int = Field(default=4, ge=0)
    recent: int = Field(default=32, ge=0)
    rotate: bool = False

    def encode(self, k_LMD: Tensor, v_LMD: Tensor) -> Tensor:
        """See the base class."""
        start, stop = self._coded(k_LMD.shape[1])
        kv_2LMD = torch.stack((k_LMD, v_LMD))
        ends_2LRD = torch.cat((kv_2LMD[:, :, :start], kv_2LMD[:, :, stop:]), dim=2)
        body_2LND = kv_2LMD[:, :, start:stop].to(torch.float32)
        k_LND, v_LND = hadamard(body_2LND) if self.rotate else body_2LND
        k_grid, k_codes = quantise(k_LND.transpose(1, 2), self.group, self.k_bits)
        v_grid, v_codes = quantise(v_LND, self.group, self.v_bits)
        parts = (ends_2LRD, k_grid, v_grid, pack(k_codes, self.k_bits), pack(v_codes, self.v_bits))
        return torch.cat([part.reshape(-1).view(torch.uint8) for part in parts])

    def decode(
        self, data: Tensor, heads: int, tokens: int, width: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """See the base class."""
        L, D = heads, width
        if data.numel() != self.nbytes(L, tokens, D, dtype):
            raise WireError(f"int KV of {data.numel()} bytes does not fit its shape")
        start, stop = self._coded(tokens)
        N = stop - start
        # the copies start at aligned addresses, wherever in a frame the bytes lie
        ends, k_grid, v_grid, k_codes, v_codes = (
            part.clone() for part in data.split(self._sizes(L, tokens, D, dtype))
        )
        k_LDN = restore(
            k_grid.view(torch.float16).view(2, L, D, -(-N // self.group)),
            unpack(k_codes, self.k_bits, L * D * N).view(L, D, N),
            self.group,
        )
        v_LND = restore(
            v_grid.view(torch.float16).view(2, L, N, -(-D // self.group)),
            unpack(v_codes, self.v_bits, L * N * D).view(L, N, D),
            self.group,
        )
        body_2LND = torch.stack((k_LDN.transpose(1, 2), v_LND))
        if self.rotate:
            body_2LND = hadamard(body_2LND)
        ends_2LRD = ends.view(dtype).view(2, L, tokens - N, D)
        k_LMD, v_LMD = torch.cat(
            (ends_2LRD[:, :, :start], body_2LND.to(dtype), ends_2LRD[:, :, start:]), dim=2
        )
        return k_LMD, v_LMD

    def nbytes(self, heads: int, tokens: int, width: int, dtype: torch.dtype) -> int:
        """See the base class."""
        return sum(self._sizes(heads, tokens, width, dtype))

    def _coded(self, tokens: int) -> tuple[int, int]:
        """The run of tokens that is coded, ``[start, stop)``; empty in a short prompt."""
        if tokens <= self.first + self.recent:
            return tokens, tokens
        return self.first, tokens - self.recent

    def _sizes(self, heads: int, tokens: int, width: int, dtype: torch.dtype) -> list[int]:
        """Bytes of each part, in wire order."""
        start, stop = self._coded(tokens)
        N, elements = stop - start, heads * (stop - start) * width
        return [
            2 * heads * (tokens - N) * width * dtype.itemsize,
            4 * heads * width * -(-N // self.group),
            4 * heads * N * -(-width // self.group),
            self.k_bits * -(-elements // 8),
            self.v_bits * -(-elements // 8),
        ]


def quantise(x: Tensor, group: int, bits: int) -> tuple[Tensor, Tensor]:
    """Grids fp16 ``[2, *, J]`` (lo, scale) and codes uint8 ``[*, n]`` of fp32 ``[*, n]``.

    Every step is one correctly rounded operation, so that a CPU and a GPU agree to the bit.
    """
    n = x.shape[-1]
    x = x.clamp(-65504.0, 65504.0)
    size = max(1, min(group, n))
    # copies of the last element fill a short group: they move neither its minimum nor its maximum
    fill = x[..., -1:].expand(*x.shape[:-1], -n % size)
    x = torch.cat((x, fill), dim=-1).view(*x.shape[:-1], -(-n // size), size)
    lo = fp16_below(x.amin(dim=-1))
    span = x.amax(dim=-1) - lo.to(torch.float32)
    # by a tensor: CUDA would turn a division by a number into a product with its inverse
    scale = -fp16_below(-span / torch.full_like(span, 2**bits - 1))
    scale = scale.clamp(min=2.0**-24)  # all elements alike: any scale above 0 gives code 0
    codes = (x - lo[..., None].to(torch.float32)) / scale[..., None].to(torch.float32)
    codes = codes.round().clamp(0, 2**bits - 1).to(torch.uint8).flatten(-2)[..., :n]
    return torch.stack((lo, scale)), codes


def restore(grid: Tensor, codes: Tensor, group: int) -> Tensor:
    """fp32 ``[*, n]`` of what :func:`quantise` made; refuses a grid that it cannot have made."""
    lo, scale = grid
    if not (grid.isfinite().all() and (scale > 0).all()):
        raise WireError("int KV holds a minimum that is no number, or a scale not above 0")
    group_of = torch.arange(codes.shape[-1], device=codes.device) // group
    # two operations: a fused one would round once, and so differ between devices
    return codes * scale.to(torch.float32)[..., group_of] + lo.to(torch.float32)[..., group_of]


def fp16_below(x: Tensor) -> Tensor:
    """The largest fp16 number that is not above ``x``, for fp32 within fp16's range."""
    near = x.to(torch.float16)
    bits = near.view(torch.int16)
    # one step down: the magnitude's bits less one above 0, plus one below 0, and 0x8001 from 0
    down = torch.where(near > 0, bits - 1, bits + 1).masked_fill(near == 0, -0x7FFF)
    return torch.where(near.to(torch.float32) > x, down.view(torch.float16), near)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8, 1-D: eight codes in ``bits`` bytes, zeros after the last code."""
    flat = codes.reshape(-1)
    words, per_word = flat.new_zeros(-(-flat.numel() // 8) * 8), _codes_per_word(bits)
    words[: flat.numel()] = flat
    words = words.view(-1, per_word).to(torch.int32)
    shifts = torch.arange(0, bits * per_word, bits, dtype=torch.int32, device=codes.device)
    words = (words << shifts).sum(dim=-1, keepdim=True, dtype=torch.int32)
    shifts = torch.arange(0, bits * per_word, 8, dtype=torch.int32, device=codes.device)
    return ((words >> shifts) & 0xFF).to(torch.uint8).view(-1)


def unpack(data: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` codes, uint8, 1-D."""
    per_word = _codes_per_word(bits)
    words = data.view(-1, bits * per_word // 8).to(torch.int32)
    shifts = torch.arange(0, bits * per_word, 8, dtype=torch.int32, device=data.device)
    words = (words << shifts).sum(dim=-1, keepdim=True, dtype=torch.int32)
    shifts = torch.arange(0, bits * per_word, bits, dtype=torch.int32, device=data.device)
    return ((words >> shifts) & (2**bits - 1)).to(torch.uint8).view(-1)[:count]


def _codes_per_word(bits: int) -> int:
    """Codes in the shortest run of whole bytes: of 3 bits eight fill three bytes."""
    return 8 if bits == 3 else 8 // bits
