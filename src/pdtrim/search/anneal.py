"""Simulated annealing over swaps: a stage takes one removed unit back and loses others instead.

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
from pdtrim.search.goal import SEARCH_ORDER, Goal
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
    goal: Goal,
    config: Annealing,
    *,
    rng: random.Random,
    allowed: frozenset[int] | None = None,
    stages: tuple[Stage, ...] = ("prefill", "decode"),
    advance: Callable[[float], None] = lambda amount: None,
) -> Measured:
    """The best state met. Ends early, without an error, when the budget is spent.

    Args:
        start: a state that meets the goal.
        allowed: units that may be removed; None for all.
        stages: whose sets may change.
    """
    objective.hold()
    best = current = start
    for step in range(config.steps):
        advance(1)
        share = config.hot * (config.cold / config.hot) ** (step / config.steps)
        temperature = max(share * start.loss, 1e-9)
        candidate = swap(current.state, goal, rng, allowed=allowed, stages=stages)
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
    goal: Goal,
    rng: random.Random,
    *,
    allowed: frozenset[int] | None = None,
    stages: tuple[Stage, ...] = ("prefill", "decode"),
) -> Removal | None:
    """A random neighbour, None if there is none; a stage's turn comes by its removed units.

    One unit comes back and one goes. Where they do not save the same, others follow until the
    stage's goal is met again, and what can then be done without comes back.
    """
    moves: list[tuple[Stage, int, int]] = []
    for stage in stages:
        out = [u for u in goal.useful(state, stage) if allowed is None or u in allowed]
        if out:
            moves += [(stage, back, rng.choice(out)) for back in state.restorable(stage)]
    if not moves:
        return None
    stage, back, out_unit = rng.choice(moves)
    swapped = state.remove(stage, out_unit).restore(stage, back)
    filled = fill(swapped, goal, stage, rng, allowed=allowed, but=back)
    if goal.missing(filled, stage):
        return state  # nothing else can stand in for this unit
    for each in sorted(stages, reverse=True):  # prefill first: in ``subset`` it holds decode's
        filled = goal.trim(filled, each, _shuffled(goal.redundant(filled, each), rng))
    return filled


def fill(
    state: Removal,
    goal: Goal,
    stage: Stage,
    rng: random.Random,
    *,
    allowed: frozenset[int] | None = None,
    but: int | None = None,
) -> Removal:
    """Remove random units until the stage's goal is met, or no unit is left."""
    while goal.missing(state, stage):
        useful = goal.useful(state, stage)
        out = [u for u in useful if u != but and (allowed is None or u in allowed)]
        if not out:
            break
        state = state.remove(stage, rng.choice(out))
    return state


def random_state(state: Removal, goal: Goal, rng: random.Random) -> Removal:
    """Random removals behind a state; they meet the goal unless a stage has too few units left."""
    for stage in SEARCH_ORDER:
        state = fill(state, goal, stage, rng)
        state = goal.trim(state, stage, _shuffled(goal.redundant(state, stage), rng))
    return state


def _shuffled(units: list[int], rng: random.Random) -> list[int]:
    return rng.sample(units, len(units)) if units else []
