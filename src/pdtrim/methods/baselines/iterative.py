"""Iterative removal by NLL: the loop that SLEB and BlockPruner share."""

from __future__ import annotations

from collections.abc import Callable, Container

from pdtrim.methods.baselines.base import Baseline, Chosen
from pdtrim.methods.baselines.nll import nll_objective
from pdtrim.methods.baselines.orders import apply_orders, ranking_mode
from pdtrim.methods.problem import Problem
from pdtrim.plan import Stage
from pdtrim.search.goal import SEARCH_ORDER, Goal
from pdtrim.search.objective import Measured, Objective


def remove_one_by_one(
    objective: Objective,
    current: Measured,
    stage: Stage,
    goal: Goal,
    allowed: Container[int],
    advance: Callable[[float], None],
) -> tuple[Measured, list[int]]:
    """Remove the unit without which the loss is least, until the stage's goal is met.

    Returns the last state, and the units in the order in which they went; the first of equals.

    Raises:
        BudgetSpent: the objective's budget ran out.
    """
    order: list[int] = []
    while goal.missing(current.state, stage):
        objective.stand_on(current)
        best, unit = current, -1
        for candidate in current.state.removable(stage):
            if candidate in allowed:
                tried = objective.measure(current.state.remove(stage, candidate))
                advance(1)
                if unit < 0 or tried.loss < best.loss:
                    best, unit = tried, candidate
        assert unit >= 0  # the caller has compared the goal with what is allowed
        current = best
        order.append(unit)
    return current, order


class Iterative(Baseline):
    """Removal one by one; subclasses say which units may go."""

    def allowed(self, problem: Problem) -> Container[int]:
        """Units that may be removed, enough for the goal."""
        return range(problem.dense().num_units)

    def choose(self, problem: Problem) -> Chosen:
        """Remove, and in the modes of one ranking give prefill what went first."""
        allowed, goal = self.allowed(problem), problem.goal
        objective = nll_objective(problem)
        mode = ranking_mode(problem.target)
        stages = SEARCH_ORDER if mode == "projected" else SEARCH_ORDER[:1]
        current = objective.measure(problem.dense(mode))
        orders: dict[Stage, list[int]] = {}
        steps = sum(goal.least(stage) for stage in stages) * current.state.num_units
        with problem.progress(f"removing: {self.name}", steps) as advance:
            for stage in stages:
                current, orders[stage] = remove_one_by_one(
                    objective, current, stage, goal, allowed, advance
                )
        return Chosen(state=apply_orders(problem, orders), block_tokens=objective.spent)
