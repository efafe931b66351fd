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
covers the group, and the codes are those of the rounded grid. A grid beyond fp16's range is
infinite, which decode refuses.

Bytes, K before V in each part: raw ends ``[2, L, R, D]``; fp16 grids ``[2, L, D, J of N]`` and
``[2, L, N, J of D]``, all lo before all scale; codes ``[L, N, D]``, eight codes in ``bits`` bytes,
the earlier code in the lower bits.

Shapes: L heads, M tokens, N of them coded and R raw, D head width, J groups; ``*`` any leading
shape.
"""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pdtrim.errors import WireError
from pdtrim.kv.codecs.base import CodecBase
from pdtrim.kv.codecs.hadamard import check_width, hadamard, rotatable
from pdtrim.kv.kernels import kernels_of, refuse
from pdtrim.records import MOST_TOKENS

Bits = Literal[2, 3, 4, 8]

NO_GRID = "int KV holds a minimum or a scale that is no number or beyond fp16, or no scale"

RUN = 2**18
"""Elements a thread: a megabyte in fp32, so that they stay in the caches near a core."""


class Integer(CodecBase):
    """``k_bits`` a key element and ``v_bits`` a value element, and an fp16 grid a group."""

    name: Literal["int"] = "int"
    k_bits: Bits = 4
    v_bits: Bits = 4
    group: int = Field(default=64, ge=1, le=MOST_TOKENS)
    first: int = Field(default=4, ge=0, le=MOST_TOKENS)
    recent: int = Field(default=32, ge=0, le=MOST_TOKENS)
    rotate: bool = False

    presets: ClassVar[str] = "int{2,3,4,8} or k{2,3,4,8}v{2,3,4,8}"
    kernels: ClassVar[str | None] = "integer"
    no_code: ClassVar[str] = NO_GRID

    @classmethod
    def preset(cls, word: str) -> dict[str, Any] | None:
        """See the base class."""
        bits = re.fullmatch("int([0-9])|k([0-9])v([0-9])", word)
        if bits is None:
            return None
        both, k_bits, v_bits = bits.groups()
        return {"k_bits": int(both or k_bits), "v_bits": int(both or v_bits)}

    @classmethod
    def menu(cls, width: int) -> tuple[str, ...]:
        """Keys and values are rotated where the width allows it."""
        return ("int8:recent=0", f"int4:recent=0{rotated(width)}", *_grids(width))

    @classmethod
    def beside(cls, width: int) -> tuple[str, str, str]:
        """See the base class."""
        grids = _grids(width)
        return grids[0], grids[2], grids[3]

    @classmethod
    def sweep(cls, width: int) -> dict[str, str]:
        """See the base class."""
        found = {f"codec@{b}": f"{b}:recent=0" for b in ("int8", "int4", "k4v2", "int3", "int2")}
        if rotate := rotated(width):
            for b in ("int4", "int3", "k3v2", "int2"):
                found[f"rotated codec@{b}"] = f"{b}:recent=0,group=128{rotate}"
        return found

    def check_width(self, width: int) -> None:
        """See the base class."""
        if self.rotate:
            check_width(width)

    @torch.no_grad()  # it writes in place
    def encode(self, k_LMD: Tensor, v_LMD: Tensor) -> Tensor:
        """See the base class."""
        L, M, D = k_LMD.shape
        if kernels := kernels_of(self, k_LMD.device, M, D):
            return kernels.encode(self, k_LMD, v_LMD)
        start, stop = self.coded(M)
        N, sizes = stop - start, self.sizes(L, M, D, k_LMD.dtype)
        data = torch.empty(sum(sizes), dtype=torch.uint8, device=k_LMD.device)
        ends, k_grid, v_grid, k_codes, v_codes = data.split(sizes)
        ends_2LRD = ends.view(k_LMD.dtype).view(2, L, M - N, D)
        for x_LMD, ends_LRD in zip((k_LMD, v_LMD), ends_2LRD, strict=True):
            ends_LRD[:, :start], ends_LRD[:, start:] = x_LMD[:, :start], x_LMD[:, stop:]
        k_grid_2LDJ = k_grid.view(torch.float16).view(2, L, D, -(-N // self.group))
        v_grid_2LNJ = v_grid.view(torch.float16).view(2, L, N, -(-D // self.group))
        for heads in head_runs(L, N * D, data.device):
            k_LND, v_LND = k_LMD[heads, start:stop], v_LMD[heads, start:stop]
            if self.rotate:
                k_LND, v_LND = hadamard(k_LND), hadamard(v_LND)
            k_grid_2LDJ[:, heads], codes = quantise(k_LND.mT, self.group, self.k_bits)
            k_codes[packed(heads, N * D, self.k_bits)] = pack(codes.mT, self.k_bits)
            v_grid_2LNJ[:, heads], codes = quantise(v_LND, self.group, self.v_bits)
            v_codes[packed(heads, N * D, self.v_bits)] = pack(codes, self.v_bits)
        return data

    def decode(
        self, data: Tensor, heads: int, tokens: int, width: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """See the base class."""
        L, M, D = heads, tokens, width
        if data.numel() != self.nbytes(L, M, D, dtype):
            raise WireError(f"int KV of {data.numel()} bytes does not fit its shape")
        if kernels := kernels_of(self, data.device, M, D):
            k_LMD, v_LMD, broken = kernels.decode(self, data, L, M, D, dtype)
            refuse(broken, self.no_code)
            return k_LMD, v_LMD
        start, stop = self.coded(M)
        N = stop - start
        ends, k_grid, v_grid, k_codes, v_codes = data.split(self.sizes(L, M, D, dtype))
        # the copies start at aligned addresses, wherever in a frame the bytes lie
        ends_2LRD = ends.clone().view(dtype).view(2, L, M - N, D)
        k_grid_2LDJ = k_grid.clone().view(torch.float16).view(2, L, D, -(-N // self.group))
        v_grid_2LNJ = v_grid.clone().view(torch.float16).view(2, L, N, -(-D // self.group))
        k_LMD, v_LMD = kv_2LMD = torch.empty(2, L, M, D, dtype=dtype, device=data.device)
        kv_2LMD[:, :, :start], kv_2LMD[:, :, stop:] = (
            ends_2LRD[:, :, :start],
            ends_2LRD[:, :, start:],
        )
        for run in head_runs(L, N * D, data.device):
            shape, count = (run.stop - run.start, N, D), (run.stop - run.start) * N * D
            codes = unpack(k_codes[packed(run, N * D, self.k_bits)], self.k_bits, count)
            k_LDN = restore(k_grid_2LDJ[:, run], codes.view(shape).mT.contiguous(), self.group)
            codes = unpack(v_codes[packed(run, N * D, self.v_bits)], self.v_bits, count)
            v_LND = restore(v_grid_2LNJ[:, run], codes.view(shape), self.group)
            k_LND = k_LDN.mT
            if self.rotate:
                k_LND, v_LND = hadamard(k_LND), hadamard(v_LND)
            k_LMD[run, start:stop], v_LMD[run, start:stop] = k_LND.to(dtype), v_LND.to(dtype)
        return k_LMD, v_LMD

    def nbytes(self, heads: int, tokens: int, width: int, dtype: torch.dtype) -> int:
        """See the base class."""
        return sum(self.sizes(heads, tokens, width, dtype))

    def coded(self, tokens: int) -> tuple[int, int]:
        """The run of tokens that is coded, ``[start, stop)``; empty in a short prompt."""
        if tokens <= self.first + self.recent:
            return tokens, tokens
        return self.first, tokens - self.recent

    def sizes(self, heads: int, tokens: int, width: int, dtype: torch.dtype) -> list[int]:
        """Bytes of each part, in wire order."""
        start, stop = self.coded(tokens)
        N, elements = stop - start, heads * (stop - start) * width
        return [
            2 * heads * (tokens - N) * width * dtype.itemsize,
            4 * heads * width * -(-N // self.group),
            4 * heads * N * -(-width // self.group),
            self.k_bits * -(-elements // 8),
            self.v_bits * -(-elements // 8),
        ]


def rotated(width: int) -> str:
    """The option that rotates heads, where their width is a power of two."""
    return ",rotate=true" if rotatable(width) else ""


def _grids(width: int) -> list[str]:
    """From fine to coarse."""
    words = ("k4v3", "k4v2", "int3", "k3v2", "int2")
    return [f"{word}:recent=0,group=128{rotated(width)}" for word in words]


def head_runs(heads: int, elements: int, device: torch.device) -> list[slice]:
    """Heads to code together, of ``elements`` each: on a CPU as many as its cache holds, else all.

    The codes of every run but the last fill whole bytes, whatever the bits a code.
    """
    step = heads
    if device.type == "cpu":
        least = 8 // math.gcd(8, elements)
        most = RUN * torch.get_num_threads() // max(1, elements)
        step = max(least, most // least * least)
    # one empty run of no heads
    starts = range(0, max(1, heads), max(1, step))
    return [slice(start, min(start + step, heads)) for start in starts]


def packed(heads: slice, elements: int, bits: int) -> slice:
    """Where the codes of a run of heads lie, in bytes."""
    return slice(bits * (heads.start * elements // 8), bits * -(-heads.stop * elements // 8))


def quantise(x: Tensor, group: int, bits: int) -> tuple[Tensor, Tensor]:
    """Grids fp16 ``[2, *, J]`` (lo, scale) and codes uint8 ``[*, n]`` of ``[*, n]``, in fp32.

    Every step is one correctly rounded operation, so that a CPU and a GPU agree to the bit.
    """
    n = x.shape[-1]
    size = max(1, min(group, n))
    x = x.contiguous().to(torch.float32)
    if n % size:
        # copies of the last element fill a short group: they move neither its least nor its most
        x = torch.cat((x, x[..., -1:].expand(*x.shape[:-1], -n % size)), dim=-1)
    x = x.view(*x.shape[:-1], -(-n // size), size)
    lo = fp16_below(x.amin(dim=-1) + 0.0)  # 0, where -0 is the least
    span = x.amax(dim=-1) - lo.to(torch.float32)
    # by a tensor: CUDA would turn a division by a number into a product with its inverse
    scale = -fp16_below(-span / torch.full_like(span, 2**bits - 1))
    scale = scale.clamp(min=2.0**-24)  # all elements alike: any scale above 0 gives code 0
    # in place: fresh memory costs a CPU more than the operations do
    x = x - lo[..., None].to(torch.float32)
    x.div_(scale[..., None].to(torch.float32))
    # a CPU is slow from fp32 to uint8, and fast by way of int16
    codes = x.round_().clamp_(0, 2**bits - 1).to(torch.int16).to(torch.uint8)
    return torch.stack((lo, scale)), codes.flatten(-2)[..., :n]


def restore(grid: Tensor, codes: Tensor, group: int) -> Tensor:
    """fp32 ``[*, n]`` of what :func:`quantise` made; refuses a grid that it cannot have made."""
    lo, scale = grid
    if not (grid.isfinite().all() and (scale > 0).all()):
        raise WireError(NO_GRID)
    n = codes.shape[-1]
    size = max(1, min(group, n))
    if n % size:  # zeros fill a short group
        codes = torch.cat((codes, codes.new_zeros(*codes.shape[:-1], -n % size)), dim=-1)
    x = codes.to(torch.float32).view(*codes.shape[:-1], -(-n // size), size)
    # two operations: a fused one would round once, and so differ between devices
    x.mul_(scale[..., None].to(torch.float32)).add_(lo[..., None].to(torch.float32))
    return x.flatten(-2)[..., :n]


def fp16_below(x: Tensor) -> Tensor:
    """The largest fp16 number that is not above ``x`` of fp32; -inf below fp16's range."""
    near = x.to(torch.float16)
    bits = near.view(torch.int16)
    # one step down: the magnitude's bits less one above 0, plus one below 0, and 0x8001 from 0
    down = torch.where(near > 0, bits - 1, bits + 1).masked_fill(near == 0, -0x7FFF)
    return torch.where(near.to(torch.float32) > x, down.view(torch.float16), near)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8, 1-D: eight codes in ``bits`` bytes, zeros after the last code."""
    flat = codes.reshape(-1)
    if flat.numel() % 8:
        flat = torch.cat((flat, flat.new_zeros(-flat.numel() % 8)))
    if bits == 8:
        return flat
    # eight codes a word, the first in its low byte, as on every machine that torch runs on
    words = flat.view(torch.int64)
    for lane in (16, 32, 64):  # moves the upper half of each lane down to the lower half's bits
        words = (words | words >> lane // 16 * (8 - bits)).bitwise_and_(_low_bits(lane, bits))
    wide = words.view(torch.uint8).view(-1, 8)
    data = torch.empty_like(wide[:, :bits])
    for byte in range(bits):  # column by column: a CPU is slow at rows of a few bytes
        data[:, byte] = wide[:, byte]
    return data.view(-1)


def unpack(data: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` codes, uint8, 1-D."""
    if bits == 8:
        return data[:count]
    narrow = data.view(-1, bits)
    wide = data.new_zeros(narrow.shape[0], 8)
    for byte in range(bits):
        wide[:, byte] = narrow[:, byte]
    words = wide.view(torch.int64).view(-1)
    for lane in (64, 32, 16):  # back up, the other way round
        words = (words | words << lane // 16 * (8 - bits)).bitwise_and_(_low_bits(lane // 2, bits))
    return words.view(torch.uint8)[:count]


def _low_bits(lane: int, bits: int) -> int:
    """A mask of 64 bits: in each lane of them, the low ``bits`` for each of its bytes."""
    return sum((1 << lane // 8 * bits) - 1 << start for start in range(0, 64, lane))
