"""Greedy removal: take out the unit whose loss hurts least for what it saves, again and again.

SLEB (2402.09025) with three differences: the measure is KL on continuation tokens under
prefill/decode inference instead of NLL, no block is protected, and harm is weighed by what a
removal saves. With a ``shortlist`` only the candidates that looked best at their last evaluation
are measured again (lazy greedy): a block that was costly with few others gone is seldom cheap with
more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from pdtrim.plan import Stage
from pdtrim.search.goal import SEARCH_ORDER, Goal
from pdtrim.search.objective import Measured, Objective
from pdtrim.search.state import Removal

FEW = 3  # candidates that are all measured on the whole text


def greedy(
    objective: Objective,
    start: Measured,
    goal: Goal,
    *,
    shortlist: int | None = None,
    thrifty: bool = False,
    halving: bool = False,
    stages: tuple[Stage, ...] = SEARCH_ORDER,
    advance: Callable[[float], None] = lambda amount: None,
) -> Measured:
    """Remove units, stage after stage, until the goal is met; ends early only when none is left.

    Args:
        halving: measure candidates on a growing part of the text, and only the better third of them
            on each larger part (successive halving: Jamieson and Talwalkar, 1502.07943).
        thrifty: shorten the list of candidates where measuring all would not leave a dense pass
            for each removal still to come.

    Raises:
        BudgetSpent: the objective's budget ran out.
    """
    run = _Greedy(objective, goal, shortlist, thrifty, halving, advance)
    to_come = sum(goal.least(stage) for stage in stages)
    for stage in stages:
        to_come -= goal.least(stage)
        start = run.prune(start, stage, to_come)
    return start


@dataclass(frozen=True)
class _Greedy:
    """What all stages of a greedy search share."""

    objective: Objective
    goal: Goal
    shortlist: int | None
    thrifty: bool
    halving: bool
    advance: Callable[[float], None]

    def prune(self, current: Measured, stage: Stage, to_come: int) -> Measured:
        """Reach one stage's goal; ``to_come`` removals follow in later stages."""
        harm: dict[int, float] = {}  # loss added by a unit when it was last tried
        least = self.goal.least(stage)
        while self.goal.missing(current.state, stage):
            least = max(least - 1, 0)
            self.objective.stand_on(current)
            best: tuple[float, float] | None = None
            found = current
            units = self._candidates(current.state, stage, harm, least + to_come)
            if self.halving:
                units = self._halved(current, stage, units, harm)
            for unit in units:
                tried = self.objective.measure(current.state.remove(stage, unit))
                harm[unit] = tried.loss - current.loss
                rank = self.goal.price(current.state, stage, unit, harm[unit]), tried.loss
                if best is None or rank < best:
                    best, found = rank, tried
                self.advance(1)
            if best is None:
                break
            current = found
        costly_first = sorted(harm, key=lambda unit: -harm[unit])
        trimmed = self.goal.trim(current.state, stage, costly_first)
        return current if trimmed == current.state else self.objective.measure(trimmed)

    def _halved(
        self, current: Measured, stage: Stage, units: list[int], harm: dict[int, float]
    ) -> list[int]:
        """The units that stay in the race on all parts of the text but the whole."""
        for parts in self.objective.levels[:-1]:
            if len(units) <= FEW:
                break
            for unit in units:
                loss_n = self.objective.score(current.state.remove(stage, unit), parts)
                harm[unit] = float((loss_n - current.loss_n[: len(loss_n)]).mean())
            ranked = sorted(
                units, key=lambda unit: self.goal.price(current.state, stage, unit, harm[unit])
            )
            self.advance(len(units) - max(FEW, len(units) // 3))
            units = ranked[: max(FEW, len(units) // 3)]
        return units

    def _candidates(
        self, state: Removal, stage: Stage, harm: dict[int, float], to_come: int
    ) -> list[int]:
        """Units to try, those that looked best first where not all are."""
        units = self.goal.useful(state, stage)

        def price(unit: int) -> float:
            return self.goal.price(state, stage, unit, harm.get(unit, math.inf))

        if harm and self.shortlist is not None:
            units = sorted(units, key=price)[: self.shortlist]
        budget = self.objective.budget
        if not self.thrifty or budget is None:
            return units
        left = budget - self.objective.spent - to_come * self.objective.dense_cost
        quotes = {unit: self.objective.quote(state.remove(stage, unit)) for unit in units}
        if sum(quotes.values()) > left:
            units = sorted(units, key=lambda unit: (price(unit), quotes[unit]))
        while len(units) > 1 and sum(quotes[unit] for unit in units) > left:
            units.pop()
        return units


def greedy_evaluations(goal: Goal, start: Removal, shortlist: int | None) -> int:
    """How many evaluations :func:`greedy` makes about, for progress bars."""
    total = 0
    for stage in SEARCH_ORDER:
        first = start.num_units
        for step in range(goal.least(stage)):
            total += min(first - step, shortlist if step and shortlist is not None else first)
    return total
