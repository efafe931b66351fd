"""What a selector may look at when a layer's prefill has ended.

Shapes: B rows, N prompt tokens handed over, E hidden width, H query heads, G KV heads, D head
width, W the last tokens of the prompt. Query head h belongs to KV head ``h // (H / G)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from pdtrim.kv.bias import KVBias


class LayerView(Protocol):
    """One layer's prompt, all rows of one length."""

    k_BGND: Tensor
    """Rotated keys."""
    v_BGND: Tensor
    h_BNE: Tensor
    """The normed stream that the projections read."""
    scale: float
    """What query-key products are multiplied by."""

    def queries(self, last: int) -> Tensor:
        """Rotated queries of the last W tokens, ``[B, H, W, D]``; W is at most N."""

    def unrotated_queries(self) -> Tensor:
        """Queries of all tokens before the rotation, ``[B, H, N, D]``."""

    def rope(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin ``[1, T, D]`` at absolute positions (1-D, int64)."""

    def output_weight(self) -> Tensor:
        """The output projection by query head, ``[H, D, E]``: what a value adds to the stream."""

    def bias(self) -> KVBias | None:
        """What the projections' biases add to this view's keys and values; None if nothing."""

    def heads(self, places: Sequence[int]) -> LayerView:
        """The same layer with some of its KV heads, in that order, and their query heads only."""
