"""A uniform step and an entropy coder: small errors for all, few bits for what is usual.

``code = round((x - mean) / step)``, ``x' = mean + step * code``. A key's step is ``k_step`` times
the root mean square of its head over the prompt, each channel's mean taken off first: its error in
a logit should not depend on which token it is. A value's step is ``v_step`` times that of its own
token: values of sinks are small and much attended, so a common step would drown them. Codes have
eight bits and are Huffman coded; a step grows where the largest code would not fit.

At equal mean error a uniform step with an entropy coder needs fewer bits than any grid of ``2**b``
equal codes (by a quarter to half a bit for normal values), because the grid must reach the extremes
and spends whole bits on codes that are seldom used.

Papers: KVTC (arXiv 2511.01815) quantises and then codes with DEFLATE, after a fixed rotation by
principal components that is not done here; CacheGen (2310.07240) codes arithmetically. Different
from both: no statistics but the prompt's own travel, and the step is chosen by plain root mean
squares. DEFLATE is used for its Huffman codes alone (no matches are searched), on the host: a GPU's
codes cross to the host and back, so this is for links slower than that.

Bytes: u32 length of the key codes; raw first tokens ``[2, L, R, D]``; fp16 key means ``[L, D]``,
key steps ``[L]``, value steps ``[L, N]``; key codes ``[L, D, N]`` and value codes ``[L, N, D]``,
each as raw DEFLATE, or as they are where that is not shorter.

Shapes: L heads, M tokens, N of them coded and R raw, D head width.
"""

from __future__ import annotations

import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pdtrim.errors import WireError
from pdtrim.kv.codecs.base import CodecBase
from pdtrim.kv.codecs.integer import fp16_below, head_runs
from pdtrim.records import MOST_TOKENS

HEAD = struct.Struct("<I")
LARGEST = 127  # code
STEPS = ((0.2, 0.5), (0.3, 0.7), (0.3, 1.1), (0.4, 0.9), (0.6, 0.9), (0.6, 1.4), (1.0, 1.8))
"""Of keys and of values, in menus and sweeps, the finest first."""

Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Raw ends, key means, key steps, value steps, key codes and value codes."""


class Entropy(CodecBase):
    """Steps over root mean squares, and how many first tokens (attention sinks) stay raw."""

    name: Literal["entropy"] = "entropy"
    k_step: float = Field(default=0.4, ge=0.02, le=4)
    v_step: float = Field(default=0.9, ge=0.02, le=4)
    first: int = Field(default=4, ge=0, le=MOST_TOKENS)

    variable: ClassVar[bool] = True
    presets: ClassVar[str] = "entropy"

    @classmethod
    def menu(cls, width: int) -> tuple[str, ...]:
        """See the base class."""
        return tuple(f"entropy:k_step={k},v_step={v}" for k, v in STEPS)

    @classmethod
    def beside(cls, width: int) -> tuple[str, str, str]:
        """See the base class."""
        menu = cls.menu(width)
        return menu[1], menu[3], menu[5]

    @classmethod
    def sweep(cls, width: int) -> dict[str, str]:
        """See the base class."""
        return {f"entropy codec@{k}/{v}": f"entropy:k_step={k},v_step={v}" for k, v in STEPS}

    def encode(self, k_LMD: Tensor, v_LMD: Tensor) -> Tensor:
        """See the base class."""
        *plain, k_codes_LND, v_codes_LND = self._quantised(k_LMD, v_LMD)
        codes = k_codes_LND.mT.contiguous().cpu(), v_codes_LND.cpu()
        with ThreadPoolExecutor(2) as pool:  # zlib lets go of the interpreter
            k_coded, v_coded = pool.map(_press, codes)
        parts = [x.cpu().reshape(-1).view(torch.uint8).numpy().tobytes() for x in plain]
        data = b"".join((HEAD.pack(len(k_coded)), *parts, k_coded, v_coded))
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(k_LMD.device)

    def decode(
        self, data: Tensor, heads: int, tokens: int, width: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """See the base class."""
        L, D = heads, width
        start = min(self.first, tokens)
        N = tokens - start
        plain = [HEAD.size, *self._plain_sizes(L, tokens, D, dtype)]
        coded = data.numel() - sum(plain)
        if coded < 0:
            raise WireError(f"entropy KV of {data.numel()} bytes is cut short")
        # the copies start at aligned addresses, wherever in a frame the bytes lie
        head, ends, mean, k_step, v_step, body = (
            part.clone() for part in data.cpu().split([*plain, coded])
        )
        border = max(0, min(int(head.view(torch.int32)), coded))
        with ThreadPoolExecutor(2) as pool:
            expand = partial(_expand, size=L * N * D)
            k_codes, v_codes = pool.map(expand, (body[:border], body[border:]))
        k_LMD, v_LMD = _restored(
            ends.view(dtype).view(2, L, start, D),
            mean.view(torch.float16).view(L, D),
            k_step.view(torch.float16).view(L, 1, 1),
            v_step.view(torch.float16).view(L, N, 1),
            k_codes.view(L, D, N).mT,
            v_codes.view(L, N, D),
        )
        return k_LMD.to(data.device), v_LMD.to(data.device)

    def round_trip(self, k_LMD: Tensor, v_LMD: Tensor) -> tuple[Tensor, Tensor]:
        """What decode will see; the entropy coder itself changes nothing, so it is left out."""
        return _restored(*self._quantised(k_LMD, v_LMD))

    @torch.no_grad()  # it writes in place
    def _quantised(self, k_LMD: Tensor, v_LMD: Tensor) -> Parts:
        """All that travels, in wire order."""
        L, M, D = k_LMD.shape
        start = min(self.first, M)
        runs: list[tuple[Tensor, ...]] = []
        for heads in head_runs(L, (M - start) * D, k_LMD.device):
            k_LND, v_LND = (x[heads, start:].to(torch.float32, copy=True) for x in (k_LMD, v_LMD))
            mean_LD = _mean(k_LND, dim=1).to(torch.float16)
            k_LND.sub_(mean_LD[:, None].to(torch.float32))
            k_step_L11, k_codes_LND = quantise(k_LND, self.k_step, dims=(1, 2))
            v_step_LN1, v_codes_LND = quantise(v_LND, self.v_step, dims=(2,))
            runs.append((mean_LD, k_step_L11, v_step_LN1, k_codes_LND, v_codes_LND))
        mean, k_step, v_step, k_codes, v_codes = map(torch.cat, zip(*runs, strict=True))
        ends_2LRD = torch.stack((k_LMD[:, :start], v_LMD[:, :start]))
        return ends_2LRD, mean, k_step, v_step, k_codes, v_codes

    def nbytes(self, heads: int, tokens: int, width: int, dtype: torch.dtype) -> int:
        """See the base class."""
        coded = heads * (tokens - min(self.first, tokens)) * width
        return HEAD.size + sum(self._plain_sizes(heads, tokens, width, dtype)) + 2 * coded

    def _plain_sizes(self, heads: int, tokens: int, width: int, dtype: torch.dtype) -> list[int]:
        """Bytes of the parts before the codes, in wire order."""
        start = min(self.first, tokens)
        return [
            2 * heads * start * width * dtype.itemsize,
            2 * heads * width,
            2 * heads,
            2 * heads * (tokens - start),
        ]


def quantise(x_LND: Tensor, step: float, *, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Steps fp16, one for all elements along ``dims``, and codes int8 ``[L, N, D]``."""
    # summed in fp64, so that fp16 hides in which order a device adds
    rms = _mean(x_LND.double().square_(), dim=dims, keepdim=True).sqrt()
    most = x_LND.abs().amax(dims, keepdim=True) if x_LND.numel() else torch.zeros_like(rms)
    wide = torch.maximum((step * rms).to(torch.float32), most.to(torch.float32) / LARGEST)
    steps = (-fp16_below(-wide)).clamp(min=2.0**-24)
    codes = (x_LND / steps.to(torch.float32)).round_().clamp_(-LARGEST, LARGEST)
    return steps, codes.to(torch.int8)


def restore(codes: Tensor, steps: Tensor) -> Tensor:
    """fp32 of what :func:`quantise` made; refuses steps that it cannot have made."""
    if not (steps.isfinite().all() and (steps > 0).all()):
        raise WireError("entropy KV holds a step that is no number or not above 0")
    return codes * steps.to(torch.float32)


def _restored(
    ends_2LRD: Tensor,
    mean_LD: Tensor,
    k_step_L11: Tensor,
    v_step_LN1: Tensor,
    k_codes_LND: Tensor,
    v_codes_LND: Tensor,
) -> tuple[Tensor, Tensor]:
    """Keys and values ``[L, M, D]``, the ends' dtype; refuses what quantise cannot have made."""
    (_, L, R, D), N = ends_2LRD.shape, v_codes_LND.shape[1]
    k_LMD, v_LMD = kv_2LMD = ends_2LRD.new_empty(2, L, R + N, D)
    kv_2LMD[:, :, :R] = ends_2LRD
    if not mean_LD.isfinite().all():
        raise WireError("entropy KV holds a mean that is no number or beyond fp16")
    for heads in head_runs(L, N * D, ends_2LRD.device):
        k_LND = restore(k_codes_LND[heads].contiguous(), k_step_L11[heads])
        k_LMD[heads, R:] = k_LND.add_(mean_LD[heads, None].to(torch.float32))
        v_LMD[heads, R:] = restore(v_codes_LND[heads], v_step_LN1[heads])
    return k_LMD, v_LMD


def _mean(x: Tensor, *, dim: int | tuple[int, ...], keepdim: bool = False) -> Tensor:
    """Mean in fp64; 0 of nothing."""
    return (
        x.double().mean(dim, keepdim=keepdim).nan_to_num(0.0)
        if x.numel()
        else x.double().sum(dim, keepdim=keepdim)
    )


def _press(codes: Tensor) -> bytes:
    """Huffman codes of int8 codes; as they are where that is not shorter."""
    stored = codes.numpy().tobytes()
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    coded = coder.compress(stored) + coder.flush()
    return coded if len(coded) < len(stored) else stored


def _expand(part: Tensor, size: int) -> Tensor:
    """int8 ``[size]`` of uint8, whatever the peer sent."""
    if part.numel() == size:
        return part.view(torch.int8)
    coder = zlib.decompressobj(-15)
    try:
        codes = coder.decompress(part.numpy().tobytes(), max(size, 1))
    except zlib.error as error:
        raise WireError(f"entropy KV cannot be expanded: {error}") from error
    if len(codes) != size or not coder.eof or coder.unused_data:
        raise WireError("entropy KV holds codes that are not of its shape's size")
    return torch.frombuffer(bytearray(codes), dtype=torch.int8)
