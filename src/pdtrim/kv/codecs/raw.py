"""The model's own dtype, unchanged: ``bf16`` for a bf16 model."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pdtrim.errors import WireError
from pdtrim.kv.codecs.base import CodecBase
from pdtrim.kv.kernels import kernels_of


class Raw(CodecBase):
    """All keys, then all values, each ``[L, M, D]`` contiguous."""

    name: Literal["raw"] = "raw"
    exact: ClassVar[bool] = True
    largest: ClassVar[float] = math.inf
    presets: ClassVar[str] = "raw (or bf16)"
    kernels: ClassVar[str | None] = "raw"

    @classmethod
    def preset(cls, word: str) -> dict[str, Any] | None:
        """See the base class."""
        return {} if word in ("raw", "bf16") else None

    @classmethod
    def menu(cls, width: int) -> tuple[str, ...]:
        """See the base class."""
        return ("raw",)

    @classmethod
    def sweep(cls, width: int) -> dict[str, str]:
        """Nothing: the dense row has it."""
        return {}

    def encode(self, k_LMD: Tensor, v_LMD: Tensor) -> Tensor:
        """See the base class."""
        _, M, D = k_LMD.shape
        if kernels := kernels_of(self, k_LMD.device, M, D):
            return kernels.encode(self, k_LMD, v_LMD)
        return torch.stack((k_LMD, v_LMD)).contiguous().view(-1).view(torch.uint8)

    def decode(
        self, data: Tensor, heads: int, tokens: int, width: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """See the base class."""
        if data.numel() != self.nbytes(heads, tokens, width, dtype):
            raise WireError(f"raw KV of {data.numel()} bytes does not fit its shape")
        k_LMD, v_LMD = data.view(dtype).view(2, heads, tokens, width)
        return k_LMD, v_LMD

    def nbytes(self, heads: int, tokens: int, width: int, dtype: torch.dtype) -> int:
        """See the base class."""
        return 2 * heads * tokens * width * dtype.itemsize

    def round_trip(self, k_LMD: Tensor, v_LMD: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing changes, so nothing is copied."""
        return k_LMD, v_LMD
