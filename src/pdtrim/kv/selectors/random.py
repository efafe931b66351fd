"""Random pairs, and the first and last tokens: the baseline that every scorer must beat.

Per KV head: the first ``first`` and last ``last`` tokens, then the tokens of the largest seeded
uniform numbers, ``max(first + last, ceil(share N))`` in all. The numbers depend on the seed, N and
the head only, so decode draws the same ones and nothing but the pairs has to travel. Layers with
one seed keep the same tokens; give them different seeds to have them differ.

Paper: none.

Shapes: G KV heads, N prompt tokens.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pdtrim.kv.selectors.base import StaticSelector
from pdtrim.kv.selectors.scoring import keep_share
from pdtrim.records import MOST_TOKENS


class Random(StaticSelector):
    """A random share of each head's pairs."""

    name: Literal["random"] = "random"
    share: float = Field(default=0.5, gt=0, le=1)
    first: int = Field(default=4, ge=0, le=MOST_TOKENS)
    last: int = Field(default=60, ge=0, le=MOST_TOKENS)
    seed: int = Field(default=0, ge=0, lt=2**32)

    @classmethod
    def sweep(cls, share: float, tokens: int) -> str:
        """See the base class."""
        return f"random:first=0,last=0,share={share}"

    def static_keep(self, heads: int, tokens: int, *, block_size: int = 1) -> Tensor:
        """Another draw for each head; single tokens, so pages are not rounded to."""
        score_GN = torch.empty(heads, tokens, dtype=torch.float64)
        for head in range(heads):
            score_GN[head] = random_score(self.seed, tokens, head)
        return keep_share(score_GN, self.share, first=self.first, last=self.last)


def random_score(seed: int, tokens: int, head: int) -> Tensor:
    """Uniform numbers ``[N]``.

    From numpy's frozen legacy stream: the two stages may run different versions of torch, whose
    generators promise no such thing.
    """
    return torch.from_numpy(np.random.RandomState((seed, tokens, head)).random_sample(tokens))
