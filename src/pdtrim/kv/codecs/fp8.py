"""Eight-bit floats, one scale a head: half the bytes of bf16.

``scale = amax / 448``, ``code = e4m3(x / scale)``, ``x' = scale * code``; 448 is the largest e4m3.
The error is at most 1/16 of the value, or ``scale / 1024`` where that is more.

Format: FP8 (arXiv 2209.05433), variant ``e4m3fn``. Different from the static per-tensor scales of
common engines: the scale is taken from the very pairs that travel, for each head and for K and V
apart, so nothing has to be calibrated.

Bytes: scales fp16 ``[2, L]``, then codes ``[2, L, M, D]``; K before V; nothing at all if M is 0.

Shapes: L heads, M tokens, D head width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pdtrim.errors import WireError
from pdtrim.kv.codecs.base import CodecBase

LARGEST = 448.0


class Fp8(CodecBase):
    """``float8_e4m3fn`` codes and an fp16 scale for each head's keys and for its values."""

    name: Literal["fp8"] = "fp8"

    def encode(self, k_LMD: Tensor, v_LMD: Tensor) -> Tensor:
        """See the base class."""
        kv_2LMD = torch.stack((k_LMD, v_LMD)).to(torch.float32)
        if kv_2LMD.shape[2] == 0:  # there is no largest of nothing
            return torch.empty(0, dtype=torch.uint8, device=k_LMD.device)
        amax_2L = kv_2LMD.abs().amax(dim=(2, 3))
        # by a tensor: CUDA would turn a division by a number into a product with its inverse
        scale_2L = amax_2L / torch.full_like(amax_2L, LARGEST)
        # an all-zero head needs some scale above 0, and fp16 ends at 65504
        scale_2L = scale_2L.clamp(2.0**-24, 65504.0).to(torch.float16)
        code_2LMD = kv_2LMD / scale_2L[..., None, None].to(torch.float32)
        code_2LMD = code_2LMD.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        return torch.cat([x.view(torch.uint8).view(-1) for x in (scale_2L, code_2LMD)])

    def decode(
        self, data: Tensor, heads: int, tokens: int, width: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """See the base class."""
        if data.numel() != self.nbytes(heads, tokens, width, dtype):
            raise WireError(f"fp8 KV of {data.numel()} bytes does not fit its shape")
        if tokens == 0:
            k_LMD, v_LMD = data.new_empty(2, heads, 0, width, dtype=dtype)
            return k_LMD, v_LMD
        # the copy starts at an aligned address, wherever in a frame the bytes lie
        scale_2L = data[: 4 * heads].clone().view(torch.float16).view(2, heads)
        code_2LMD = data[4 * heads :].clone().view(torch.float8_e4m3fn)
        code_2LMD = code_2LMD.view(2, heads, tokens, width)
        kv_2LMD = code_2LMD.to(torch.float32) * scale_2L[..., None, None].to(torch.float32)
        if not (kv_2LMD.isfinite().all() and (scale_2L > 0).all()):
            raise WireError("fp8 KV holds a value that is no number, or a scale not above 0")
        k_LMD, v_LMD = kv_2LMD.to(dtype)
        return k_LMD, v_LMD

    def nbytes(self, heads: int, tokens: int, width: int, dtype: torch.dtype) -> int:
        """See the base class."""
        return 2 * heads * (2 + tokens * width) if tokens else 0
