"""Simulated annealing over swaps: a stage takes one removed block back and loses another.

Greedy removal is nested and cannot undo a choice; a swap can. Worse states are accepted with
probability ``exp((current - candidate) / T)``, T falling geometrically. Losses are memoised: a
state that was seen before is measured again only if it is accepted, for its streams.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from pdtrim.plan import Stage
from pdtrim.search.objective import BudgetSpent, Measured, Objective
from pdtrim.search.state import Removal


@dataclass(frozen=True, kw_only=True)
class Annealing:
    """Steps, and temperatures as shares of the starting loss."""

    steps: int = 60
    hot: float = 0.05
    cold: float = 0.002


def anneal(
    objective: Objective,
    start: Measured,
    config: Annealing,
    *,
    rng: random.Random,
    allowed: frozenset[int] | None = None,
    stages: tuple[Stage, ...] = ("prefill", "decode"),
    advance: Callable[[float], None] = lambda amount: None,
) -> Measured:
    """The best state met. Ends early, without an error, when the budget is spent.

    Args:
        allowed: blocks that may be removed; None for all.
        stages: whose sets may change.
    """
    best = current = start
    for step in range(config.steps):
        advance(1)
        share = config.hot * (config.cold / config.hot) ** (step / config.steps)
        temperature = max(share * start.loss, 1e-9)
        candidate = swap(current.state, rng, allowed=allowed, stages=stages)
        if candidate is None:
            break
        known = objective.memo.get(candidate)
        if known is not None and not accepts(current.loss, known, temperature, rng):
            continue
        objective.stand_on(current)
        try:
            tried = objective.measure(candidate)
        except BudgetSpent:
            break
        if known is not None or accepts(current.loss, tried.loss, temperature, rng):
            current = tried
        if tried.loss < best.loss:
            best = tried
    return best


def accepts(current: float, candidate: float, temperature: float, rng: random.Random) -> bool:
    """Metropolis rule."""
    return candidate <= current or rng.random() < math.exp((current - candidate) / temperature)


def swap(
    state: Removal,
    rng: random.Random,
    *,
    allowed: frozenset[int] | None = None,
    stages: tuple[Stage, ...] = ("prefill", "decode"),
) -> Removal | None:
    """A random neighbour, None if there is none; a stage's turn comes by its removed blocks."""
    moves: list[tuple[Stage, int, int]] = []
    for stage in stages:
        out = [i for i in state.removable(stage) if allowed is None or i in allowed]
        if out:
            moves += [(stage, back, rng.choice(out)) for back in state.restorable(stage)]
    if not moves:
        return None
    stage, back, out_layer = rng.choice(moves)
    return state.remove(stage, out_layer).restore(stage, back)
