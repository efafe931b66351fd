"""What happens at which step: the learning rate and the rows. Functions of the step alone, so that
a resumed run needs no state of them.
"""

from __future__ import annotations

import math
import random
from functools import lru_cache


def rate_share(step: int, steps: int, warmup: float) -> float:
    """The learning rate of a step as a share of the highest: a linear rise, then half a cosine.

    Args:
        step: from 0.
        warmup: share of the steps that rise.
    """
    rise = math.ceil(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    return (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))) / 2


def rows_of(step: int, count: int, total: int, seed: int) -> list[int]:
    """The ``count`` rows of a step: every row once an epoch, each epoch in an order of its own."""
    first = step * count
    return [_order(at // total, total, seed)[at % total] for at in range(first, first + count)]


@lru_cache(maxsize=2)
def _order(epoch: int, total: int, seed: int) -> list[int]:
    return random.Random(f"{seed} {epoch}").sample(range(total), total)
