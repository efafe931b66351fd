"""Eight-bit floats, one scale a head: half the bytes of bf16.

``scale = amax / 448``, ``code = e4m3(x / scale)``, ``x' = scale * code``; 448 is the largest e4m3.
The error is at most 1/16 of the value, or ``scale / 1024`` where that is more.

Format: FP8 (arXiv 2209.05433), variant ``e4m3fn``. Different from the static per-tensor scales of
common engines: the scale is taken from the very pairs that travel, for each head and for K and V
apart, so nothing has to be calibrated.

Bytes: scales fp16 ``[2, L]``, then codes ``[2, L, M, D]``; K before V; nothing at all if M is 0.

Shapes: L heads (l of them in a run), M tokens, D head width.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from pdtrim.errors import WireError
from pdtrim.kv.codecs.base import CodecBase
from pdtrim.kv.codecs.integer import fp16_below, head_runs
from pdtrim.kv.kernels import kernels_of, refuse

LARGEST = 448.0
NO_NUMBER = 0x7F  # the code, but for its sign
WIDENING = 256.0


class Fp8(CodecBase):
    """``float8_e4m3fn`` codes and an fp16 scale for each head's keys and for its values."""

    name: Literal["fp8"] = "fp8"
    largest: ClassVar[float] = LARGEST * 65504.0
    presets: ClassVar[str] = "fp8"
    kernels: ClassVar[str | None] = "fp8"
    no_code: ClassVar[str] = "fp8 KV holds a scale or a value that is no number, or no scale"

    @torch.no_grad()  # it writes in place
    def encode(self, k_LMD: Tensor, v_LMD: Tensor) -> Tensor:
        """See the base class."""
        L, M, D = k_LMD.shape
        if kernels := kernels_of(self, k_LMD.device, M, D):
            return kernels.encode(self, k_LMD, v_LMD)
        size = self.nbytes(L, M, D, k_LMD.dtype)
        data = torch.empty(size, dtype=torch.uint8, device=k_LMD.device)
        if M == 0:  # there is no largest of nothing
            return data
        scale_2L = data[: 4 * L].view(torch.float16).view(2, L)
        code_2LMD = data[4 * L :].view(torch.float8_e4m3fn).view(2, L, M, D)
        for run in head_runs(L, M * D, data.device):
            for x_LMD, scale_L, code_LMD in zip((k_LMD, v_LMD), scale_2L, code_2LMD, strict=True):
                x_lMD = x_LMD[run].to(torch.float32)
                amax_l = x_lMD.abs().amax(dim=(1, 2))
                # by a tensor: CUDA would turn a division by a number into a product
                scale_l = amax_l / torch.full_like(amax_l, LARGEST)
                scale_l = fp16_scale(scale_l)
                y_lMD = x_lMD / scale_l[:, None, None].to(torch.float32)
                scale_L[run], code_LMD[run] = scale_l, y_lMD.clamp_(-LARGEST, LARGEST)
        return data

    def decode(
        self, data: Tensor, heads: int, tokens: int, width: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """See the base class."""
        L, M, D = heads, tokens, width
        if data.numel() != self.nbytes(L, M, D, dtype):
            raise WireError(f"fp8 KV of {data.numel()} bytes does not fit its shape")
        if kernels := kernels_of(self, data.device, M, D):
            k_LMD, v_LMD, broken = kernels.decode(self, data, L, M, D, dtype)
            refuse(broken, self.no_code)
            return k_LMD, v_LMD
        k_LMD, v_LMD = kv_2LMD = data.new_empty(2, L, M, D, dtype=dtype)
        if M == 0:
            return k_LMD, v_LMD
        # the copy starts at an aligned address, wherever in a frame the bytes lie
        scale_2L = data[: 4 * L].clone().view(torch.float16).view(2, L)
        code_2LMD = data[4 * L :].view(2, L, M, D)
        if not (scale_2L.isfinite().all() and (scale_2L > 0).all()):
            raise WireError("fp8 KV holds a scale that is no number or not above 0")
        for run in head_runs(L, M * D, data.device):
            for x_LMD, scale_L, code_LMD in zip(kv_2LMD, scale_2L, code_2LMD, strict=True):
                y_lMD = widened(code_LMD[run])
                y_lMD.mul_(scale_L[run, None, None].to(torch.float32) * WIDENING)
                x_LMD[run] = y_lMD
        return k_LMD, v_LMD

    def nbytes(self, heads: int, tokens: int, width: int, dtype: torch.dtype) -> int:
        """See the base class."""
        return 2 * heads * (2 + tokens * width) if tokens else 0


def fp16_scale(scale_l: Tensor) -> Tensor:
    """fp16 of scales in fp32; infinite beyond its range, and never 0.

    Scales below 2**-14 have few bits left: those that would clip more than rounding does are
    rounded up.
    """
    near_l = scale_l.clamp(min=2.0**-24).to(torch.float16)
    clips_l = scale_l > near_l.to(torch.float32) * (1 + 2.0**-8)
    return torch.where(clips_l, -fp16_below(-scale_l), near_l)


def widened(codes: Tensor) -> Tensor:
    """fp32 of e4m3 codes (uint8), over ``WIDENING``; refuses a code that is no number.

    A CPU converts e4m3 element by element, and fp16 quickly. As fp16, whose exponent has one bit
    more and a bias of 15 in place of 7, a code moved up by seven bits is its value over 2**8.
    """
    if codes.numel() and (codes & NO_NUMBER).amax() == NO_NUMBER:
        raise WireError("fp8 KV holds a value that is no number")
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7)
    # the sign was extended into the bit below it as well
    return bits.bitwise_and_(~0x4000).view(torch.float16).to(torch.float32)
