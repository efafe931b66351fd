"""From rankings to search states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from pdtrim.errors import PlanError
from pdtrim.methods.problem import Problem, Target
from pdtrim.plan import Mode, Stage
from pdtrim.search.goal import SEARCH_ORDER
from pdtrim.search.state import Removal


def ranking_mode(target: Target) -> Mode:
    """``projected`` if each stage is ranked alone, ``unified`` if one ranking serves both."""
    return "projected" if target.mode == "projected" else "unified"


def apply_orders(problem: Problem, orders: Mapping[Stage, Iterable[int]]) -> Removal:
    """Remove each stage's units in their order until its goal is met.

    Args:
        orders: most removable first. Where prefill has none it takes decode's, and so the first
            of those that decode loses.
    """
    state, goal = problem.dense(), problem.goal
    for stage in SEARCH_ORDER:
        for unit in orders.get(stage, orders.get("decode", ())):
            if goal.missing(state, stage):
                state = state.remove(stage, unit)
    return state


def open_blocks(name: str, problem: Problem, first: int, last: int) -> range:
    """Blocks that may go where the ``first`` and the ``last`` few are protected.

    Raises:
        PlanError: together they do not meet the goal.
    """
    dense, goal = problem.dense(), problem.goal
    left = range(first, max(dense.num_layers - last, first))
    units = frozenset(left)
    if not goal.met(replace(dense, prefill=units, decode=units)):
        wanted = max(goal.least(stage) for stage in SEARCH_ORDER)
        raise PlanError(
            f"method '{name}' protects the first {first} and the last {last} of"
            f" {dense.num_layers} blocks, so {len(left)} can go, not {max(wanted, len(left) + 1)}:"
            " remove fewer, or change its settings"
        )
    return left
