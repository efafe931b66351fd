"""Keep the first and the last tokens of the prompt, drop the middle.

``kept = [0, first) + [n - last, n)`` of the n tokens handed over.

Paper: PDTrim (arXiv 2509.04467, v1 to v3), "token-aware cache pruning"; the rule is that of
attention sinks (StreamingLLM, 2309.17453) applied to the prompt once, at the handover, in selected
layers only. Different from StreamingLLM: tokens that decode adds are all kept, and positions are
not re-numbered. Different from the paper: with an engine whose pages hold ``block_size`` tokens the
kept runs round outward to whole pages, because a page is what such an engine can send or free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pdtrim.kv.selectors.base import Observed, StaticSelector
from pdtrim.records import MOST_TOKENS


class FirstLast(StaticSelector):
    """The first ``first`` and the last ``last`` tokens of every head."""

    asked: ClassVar[Sequence[str]] = ("share", "cutoff")
    default_layers: ClassVar[Literal["all", "auto"]] = "auto"

    name: Literal["first_last"] = "first_last"
    first: int = Field(default=4, ge=0, le=MOST_TOKENS)
    last: int = Field(default=60, ge=0, le=MOST_TOKENS)

    @model_validator(mode="after")
    def _check(self) -> FirstLast:
        if self.first + self.last == 0:
            raise ValueError("'first_last' must keep at least one token")
        return self

    @classmethod
    def fit(
        cls, observed: Observed, options: Mapping[str, str], share: float | None
    ) -> Sequence[FirstLast]:
        """With a share, ``last`` is what keeps that much of a calibration prompt."""
        plain = cls.build(options)
        if share is not None:
            kept = math.ceil(share * observed.tokens - 1e-9)  # as shares of other selectors round
            plain = cls(first=plain.first, last=max(1, kept - plain.first))
        return [plain] * observed.num_layers

    @classmethod
    def sweep(cls, share: float, tokens: int) -> str:
        """StreamingLLM's rule, which holds in every layer."""
        return f"first_last:first=4,last={max(1, round(tokens * share) - 4)},layers=all"

    def static_keep(self, heads: int, tokens: int, *, block_size: int = 1) -> Tensor:
        """The same for each head."""
        keep_N = first_last(tokens, first=self.first, last=self.last, block_size=block_size)
        return keep_N.expand(heads, tokens)


def first_last(tokens: int, *, first: int, last: int, block_size: int = 1) -> Tensor:
    """bool ``[N]``."""
    head = min(tokens, -(-first // block_size) * block_size)
    tail = max(0, tokens - last) // block_size * block_size
    at = torch.arange(tokens)
    return (at < head) | (at >= tail)
