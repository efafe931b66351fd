"""A uniform step and an entropy coder: small errors for all, few bits for what is usual.

``code = round((x - mean) / step)``, ``x' = mean + step * code``. A key's step is ``k_step`` times
the root mean square of its head over the prompt, each channel's mean taken off first: its error in
a logit should not depend on which token it is. A value's step is ``v_step`` times that of its own
token: values of sinks are small and much attended, so a common step would drown them. Codes have
eight bits and travel at about their entropy (``codecs/rans.py``); a step grows where the largest
code would not fit.

At equal mean error a uniform step with an entropy coder needs fewer bits than any grid of ``2**b``
equal codes (by a quarter to half a bit for normal values), because the grid must reach the extremes
and spends whole bits on codes that are seldom used.

Papers: KVTC (arXiv 2511.01815) quantises and then codes with DEFLATE, after a fixed rotation by
principal components that is not done here; CacheGen (2310.07240) codes arithmetically. Different
from both: no statistics but the prompt's own travel, the step is chosen by plain root mean squares,
and no histogram is made.

Bytes: raw first tokens ``[2, L, R, D]``; fp16 key means ``[L, D]``, key steps ``[L]``, value steps
``[L, N]``; heads and words of the codes ``[2 L, N, D]``, keys before values.

Shapes: L heads, M tokens, N of them coded and R raw, D head width.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pdtrim.errors import WireError
from pdtrim.kv.codecs import rans
from pdtrim.kv.codecs.base import CodecBase
from pdtrim.kv.codecs.integer import fp16_below, head_runs
from pdtrim.kv.kernels import kernels_of, refuse
from pdtrim.records import MOST_TOKENS

LARGEST = 127  # code
STEPS = ((0.2, 0.5), (0.3, 0.7), (0.3, 1.1), (0.4, 0.9), (0.6, 0.9), (0.6, 1.4), (1.0, 1.8))
"""Of keys and of values, in menus and sweeps, the finest first."""

Quantised = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Raw ends, key means, key steps, value steps, key codes and value codes."""


class Entropy(CodecBase):
    """Steps over root mean squares, and how many first tokens (attention sinks) stay raw."""

    name: Literal["entropy"] = "entropy"
    k_step: float = Field(default=0.4, ge=0.02, le=4)
    v_step: float = Field(default=0.9, ge=0.02, le=4)
    first: int = Field(default=4, ge=0, le=MOST_TOKENS)

    variable: ClassVar[bool] = True
    presets: ClassVar[str] = "entropy"
    kernels: ClassVar[str | None] = "entropy"
    no_code: ClassVar[str] = "entropy KV holds codes, a mean or a step that no encoder makes"

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
        if kernels := kernels_of(self, k_LMD.device, *k_LMD.shape[1:]):
            return kernels.encode(self, k_LMD, v_LMD)
        *plain, k_codes_LND, v_codes_LND = self._quantised(k_LMD, v_LMD)
        codes_PND = torch.cat((k_codes_LND, v_codes_LND))
        parts = [x.cpu().reshape(-1).view(torch.uint8) for x in plain]
        coded = [x.reshape(-1) for x in rans.encode(codes_PND, "normal")]
        return torch.cat((*parts, *coded)).to(k_LMD.device)

    def decode(
        self, data: Tensor, heads: int, tokens: int, width: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """See the base class."""
        L, D = heads, width
        start = min(self.first, tokens)
        N = tokens - start
        if kernels := kernels_of(self, data.device, tokens, D):
            k_LMD, v_LMD, broken = kernels.decode(self, data, L, tokens, D, dtype)
            refuse(broken, self.no_code)
            return k_LMD, v_LMD
        ends, mean, k_step, v_step, lanes, words = self.parts(data.cpu(), L, tokens, D, dtype)
        codes_PND = rans.decode(lanes, words, (2 * L, N, D))
        k_LMD, v_LMD = _restored(
            ends.view(dtype).view(2, L, start, D),
            mean.view(torch.float16).view(L, D),
            k_step.view(torch.float16),
            v_step.view(torch.float16).view(L, N),
            codes_PND[:L],
            codes_PND[L:],
        )
        return k_LMD.to(data.device), v_LMD.to(data.device)

    def parts(
        self, data: Tensor, heads: int, tokens: int, width: int, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """The bytes cut up in wire order, each part from an aligned address.

        Raises:
            WireError: too few bytes for the parts before the words.
        """
        return rans.cut(data, self._plain_sizes(heads, tokens, width, dtype), self.name)

    def round_trip(self, k_LMD: Tensor, v_LMD: Tensor) -> tuple[Tensor, Tensor]:
        """What decode will see; the entropy coder itself changes nothing, so it is left out."""
        return _restored(*self._quantised(k_LMD, v_LMD))

    @torch.no_grad()  # it writes in place
    def _quantised(self, k_LMD: Tensor, v_LMD: Tensor) -> Quantised:
        """All that travels, in wire order."""
        L, M, D = k_LMD.shape
        start = min(self.first, M)
        runs: list[tuple[Tensor, ...]] = []
        for heads in head_runs(L, (M - start) * D, k_LMD.device):
            k_LND, v_LND = (x[heads, start:].to(torch.float32, copy=True) for x in (k_LMD, v_LMD))
            mean_LD, k_step_L = key_steps(*_statistics(k_LND), M - start, self.k_step)
            k_LND.sub_(mean_LD[:, None].to(torch.float32))
            v_step_LN = value_steps(v_LND, self.v_step)
            k_codes_LND = codes(k_LND, k_step_L[:, None, None])
            runs.append(
                (mean_LD, k_step_L, v_step_LN, k_codes_LND, codes(v_LND, v_step_LN[..., None]))
            )
        mean, k_step, v_step, k_codes, v_codes = map(torch.cat, zip(*runs, strict=True))
        ends_2LRD = torch.stack((k_LMD[:, :start], v_LMD[:, :start]))
        return ends_2LRD, mean, k_step, v_step, k_codes, v_codes

    def nbytes(self, heads: int, tokens: int, width: int, dtype: torch.dtype) -> int:
        """See the base class."""
        words = rans.most_bytes(2 * heads, tokens - min(self.first, tokens), width)
        return sum(self._plain_sizes(heads, tokens, width, dtype)) + words

    def _plain_sizes(self, heads: int, tokens: int, width: int, dtype: torch.dtype) -> list[int]:
        """Bytes of the parts before the words, in wire order."""
        start = min(self.first, tokens)
        return [
            2 * heads * start * width * dtype.itemsize,
            2 * heads * width,
            2 * heads,
            2 * heads * (tokens - start),
            rans.head_bytes(2 * heads, tokens - start, width),
        ]


def key_steps(
    total_LD: Tensor,
    squares_LD: Tensor,
    least_LD: Tensor,
    most_LD: Tensor,
    tokens: int,
    step: float,
) -> tuple[Tensor, Tensor]:
    """Means ``[L, D]`` and steps ``[L]`` of keys, both fp16, from sums over their tokens.

    Sums are in fp64, so that fp16 hides in which order a device adds.
    """
    mean_LD = (total_LD / max(1, tokens)).to(torch.float32).to(torch.float16)
    m_LD = mean_LD.double()
    centred_LD = squares_LD - 2 * m_LD * total_LD + tokens * m_LD * m_LD
    rms_L = centred_LD.clamp(min=0).mean(1).div(max(1, tokens)).sqrt()
    m_LD = mean_LD.to(torch.float32)
    apart_LD = torch.maximum(most_LD.to(torch.float32) - m_LD, m_LD - least_LD.to(torch.float32))
    return mean_LD, steps(step * rms_L, apart_LD.amax(1))


def value_steps(v_LND: Tensor, step: float) -> Tensor:
    """Steps of values, fp16 ``[L, N]``."""
    rms_LN = v_LND.double().square_().mean(2).sqrt()
    return steps(step * rms_LN, v_LND.abs().amax(2))


def steps(wanted: Tensor, most: Tensor) -> Tensor:
    """fp16 steps, at least as wide as wanted and wide enough for the largest code."""
    # by a tensor: CUDA would turn a division by a number into a product with its inverse
    wide = torch.maximum(wanted.to(torch.float32), most / torch.full_like(most, LARGEST))
    return (-fp16_below(-wide)).clamp(min=2.0**-24)


def codes(x_LND: Tensor, step: Tensor) -> Tensor:
    """int8 codes."""
    return (x_LND / step.to(torch.float32)).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)


def _statistics(k_LND: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums, sums of squares, least and most of each channel, fp64 ``[L, D]``; zeros of nothing."""
    wide_LND = k_LND.double()
    if not k_LND.shape[1]:
        none_LD = wide_LND.sum(1)
        return none_LD, none_LD, none_LD, none_LD
    return wide_LND.sum(1), wide_LND.square().sum(1), wide_LND.amin(1), wide_LND.amax(1)


def restore(codes: Tensor, steps: Tensor) -> Tensor:
    """fp32 of codes; refuses steps that :func:`steps` cannot have made."""
    if not (steps.isfinite().all() and (steps > 0).all()):
        raise WireError("entropy KV holds a step that is no number or not above 0")
    return codes * steps.to(torch.float32)


def _restored(
    ends_2LRD: Tensor,
    mean_LD: Tensor,
    k_step_L: Tensor,
    v_step_LN: Tensor,
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
        k_LND = restore(k_codes_LND[heads], k_step_L[heads, None, None])
        k_LMD[heads, R:] = k_LND.add_(mean_LD[heads, None].to(torch.float32))
        v_LMD[heads, R:] = restore(v_codes_LND[heads], v_step_LN[heads, :, None])
    return k_LMD, v_LMD
