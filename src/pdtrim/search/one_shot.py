"""One-shot removal: rank units by the loss of removing each alone, take the cheapest.

The ranking of Shortened LLaMA (2402.02834) with KL in place of perplexity and, where units save
different amounts, loss over saving. What removals do to one another is not seen.
"""

from __future__ import annotations

from collections.abc import Callable

from pdtrim.search.goal import SEARCH_ORDER, Goal
from pdtrim.search.objective import Measured, Objective


def one_shot(
    objective: Objective,
    start: Measured,
    goal: Goal,
    *,
    advance: Callable[[float], None] = lambda amount: None,
) -> Measured:
    """Remove the units with the least loss alone, until the goal is met or none is left.

    In mode ``subset`` prefill may lose only what decode has lost: its units are then ranked from
    the state with decode's removed.

    Raises:
        BudgetSpent: the objective's budget ran out.
    """
    state = start.state
    for stage in SEARCH_ORDER:
        if not goal.missing(state, stage):
            continue
        base = start if start.state.mode == "projected" else objective.measure(state)
        objective.stand_on(base)
        price: dict[int, float] = {}
        for unit in goal.useful(base.state, stage):
            harm = objective.measure(base.state.remove(stage, unit)).loss - base.loss
            price[unit] = harm / goal.savings(stage)[unit]
            advance(1)
        for unit in sorted(price, key=lambda unit: price[unit]):
            if goal.missing(state, stage):
                state = state.remove(stage, unit)
        state = goal.trim(state, stage, sorted(price, key=lambda unit: -price[unit]))
    objective.stand_on(start)
    return objective.measure(state)
