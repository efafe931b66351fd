"""Some KV heads keep every token, the others the first and the last: one choice for all prompts.

``kept(g) = [0, N) if g in full_heads else [0, first) + [N - last, N)``.

Paper: DuoAttention (arXiv 2410.10819). Different from the paper, which trains a gate for each KV
head on synthetic pass keys: heads are ranked by the attention that they pay on calibration text to
anything but the first and last tokens, see :func:`retrieval_score`. With an engine whose pages hold
``block_size`` tokens the kept runs round outward to whole pages, as in ``first_last``.

Shapes: H query heads, G KV heads, R = H / G, N prompt tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, field_validator
from torch import Tensor

from pdtrim.errors import PlanError
from pdtrim.kv.selectors.base import Observed, StaticSelector
from pdtrim.kv.selectors.first_last import FirstLast, first_last
from pdtrim.records import MOST_TOKENS


class Duo(StaticSelector):
    """Whole heads and first-and-last heads."""

    fitted: ClassVar[Mapping[str, Any]] = {"full_heads": ()}
    asked: ClassVar[Sequence[str]] = ("share",)
    numbers_heads: ClassVar[bool] = True

    name: Literal["duo"] = "duo"
    full_heads: tuple[NonNegativeInt, ...] = ()
    first: int = Field(default=64, ge=0, le=MOST_TOKENS)
    last: int = Field(default=256, ge=1, le=MOST_TOKENS)

    @field_validator("full_heads")
    @classmethod
    def _ordered(cls, heads: tuple[int, ...]) -> tuple[int, ...]:
        if heads != tuple(sorted(set(heads))):
            raise ValueError("must rise, each head once")
        return heads

    @classmethod
    def fit(
        cls, observed: Observed, options: Mapping[str, str], share: float | None
    ) -> Sequence[Duo]:
        """The ``share`` (half, unless given) of all heads that need the middle most are whole."""
        plain, kv_heads = cls.build(options), observed.num_kv_heads
        mass_LH = observed.concentration(FirstLast(first=plain.first, last=plain.last))
        score_LG = torch.stack([retrieval_score(row, kv_heads) for row in mass_LH])
        whole = score_LG.flatten().argsort(descending=True, stable=True)
        whole = whole[: round((0.5 if share is None else share) * score_LG.numel())]
        full: list[list[int]] = [[] for _ in range(observed.num_layers)]
        for at in whole.tolist():
            full[at // kv_heads].append(at % kv_heads)
        return [cls.build(options, full_heads=tuple(sorted(heads))) for heads in full]

    @classmethod
    def sweep(cls, share: float, tokens: int) -> str:
        """See the base class; the other heads keep about a tenth."""
        return f"duo:share={round(max(0.0, (share - 0.1) / 0.9), 3)},first=4,last=48"

    def static_keep(self, heads: int, tokens: int, *, block_size: int = 1) -> Tensor:
        """Rows of the whole heads are True throughout."""
        if self.full_heads and self.full_heads[-1] >= heads:
            raise PlanError(
                f"'duo' names KV head {self.full_heads[-1]}, but the layer has {heads}, from 0"
            )
        edge_N = first_last(tokens, first=self.first, last=self.last, block_size=block_size)
        keep_GN = edge_N.repeat(heads, 1)
        keep_GN[list(self.full_heads)] = True
        return keep_GN


def retrieval_score(mass_H: Tensor, kv_heads: int) -> Tensor:
    """How much each KV head needs the middle of the prompt, ``[G]`` in 0 to 1.

    Args:
        mass_H: by query head, the share of attention on the first and last tokens.
        kv_heads: G. A KV head must be whole as soon as one of its query heads looks back, hence
            the largest of its group and not the mean.
    """
    return (1 - mass_H).unflatten(0, (kv_heads, -1)).amax(dim=1)
