"""Evolution by level switches, after EvoPress (2410.14649).

Random states that meet the goal are the start; the best is the parent. Each generation makes
offspring of it by a few swaps, min(U{1..3}, U{1..3}) of them, and selects in rounds: all on little
text, the survivors of each round on more, the last against the parent on the whole text.

Differences from the paper: the rounds use the same nested parts of the text each time, where
EvoPress draws new text at each selection; a state is measured on a part only once; both stages are
searched together; the loss is KL under prefill/decode inference, from the layer on where offspring
and parent differ.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from pdtrim.search.anneal import random_state, swap
from pdtrim.search.goal import Goal
from pdtrim.search.objective import BudgetSpent, Measured, Objective
from pdtrim.search.state import Removal


@dataclass(frozen=True, kw_only=True)
class Evolution:
    """Random states at the start, offspring a generation, the share that survives a round."""

    starts: int = 16
    offspring: int = 16
    survive: float = 0.25
    generations: int = 30


def evolution(
    objective: Objective,
    start: Measured,
    goal: Goal,
    config: Evolution,
    *,
    rng: random.Random,
    advance: Callable[[float], None] = lambda amount: None,
) -> Measured:
    """The best state met, the start if random removals do not meet the goal.

    Ends early, without an error, when the budget is spent.

    Raises:
        BudgetSpent: the budget did not reach one state on the whole text.
    """
    objective.stand_on(start)
    drawn = {random_state(start.state, goal, rng): None for _ in range(config.starts)}
    first = [state for state in drawn if goal.met(state)]
    if not first:
        return start
    parent = objective.measure(best_of(objective, first, config.survive))
    objective.hold()
    for _ in range(config.generations):
        advance(1)
        objective.stand_on(parent, start)
        children = {mutate(parent.state, goal, rng): None for _ in range(config.offspring)}
        children.pop(parent.state, None)
        if not children:
            break
        try:
            winner = best_of(objective, list(children), config.survive)
            if float(objective.score(winner).mean()) < parent.loss:
                parent = objective.measure(winner)
        except BudgetSpent:
            break
    return min(
        (objective.recall(state) for state in objective.memo if goal.met(state)),
        key=lambda measured: measured.loss,
    )


def mutate(state: Removal, goal: Goal, rng: random.Random) -> Removal:
    """A state a few swaps away: mostly one, at most three."""
    for _ in range(min(rng.randint(1, 3), rng.randint(1, 3))):
        state = swap(state, goal, rng) or state
    return state


def best_of(objective: Objective, states: list[Removal], survive: float) -> Removal:
    """The best of some states, in rounds on growing text; a share survives each round."""
    for parts in objective.levels:
        states = sorted(states, key=lambda state: float(objective.score(state, parts).mean()))
        if parts < len(objective.batches):
            states = states[: max(1, round(survive * len(states)))]
    return states[0]
