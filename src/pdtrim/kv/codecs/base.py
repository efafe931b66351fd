"""What every codec answers to.

A codec is a frozen record of its parameters and a pair of pure functions between tensors and the
bytes that cross the wire. Heads are independent of one another: encoding them together or one by
one gives the same values, so the simulator may encode a whole batch at once. The same input gives
the same bytes on a CPU and on a GPU.

Shapes: L heads (of any number of rows), M kept tokens in order, D head width.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from pdtrim.records import Frozen


class CodecBase(Frozen):
    """Parameters of one codec."""

    name: str

    @abstractmethod
    def encode(self, k_LMD: Tensor, v_LMD: Tensor) -> Tensor:
        """The bytes that travel: uint8, 1-D, contiguous, on the input's device.

        Numbers that the codec cannot hold are refused by :meth:`decode`, never clipped.
        """

    @abstractmethod
    def decode(
        self, data: Tensor, heads: int, tokens: int, width: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Keys and values ``[L, M, D]`` of ``dtype``.

        Raises:
            WireError: the bytes do not have the length, or the content, that the shape demands.
        """

    @abstractmethod
    def nbytes(self, heads: int, tokens: int, width: int, dtype: torch.dtype) -> int:
        """Exact length of the encoding; for a codec of variable length, the most it can be."""

    exact: ClassVar[bool] = False
    """Whether decode sees every bit that prefill had."""
    largest: ClassVar[float] = 65504.0
    """The largest magnitude that the codec is sure to hold; here fp16's."""

    @property
    def variable(self) -> bool:
        """Whether :meth:`nbytes` is only a bound."""
        return False

    def round_trip(self, k_LMD: Tensor, v_LMD: Tensor) -> tuple[Tensor, Tensor]:
        """What decode will see; the simulator's whole view of a codec."""
        L, M, D = k_LMD.shape
        return self.decode(self.encode(k_LMD, v_LMD), L, M, D, k_LMD.dtype)
