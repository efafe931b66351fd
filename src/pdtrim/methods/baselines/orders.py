"""From rankings to search states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pdtrim.errors import PlanError
from pdtrim.methods.base import Target
from pdtrim.models.model import Model
from pdtrim.plan import Mode, Stage
from pdtrim.search.goal import SEARCH_ORDER, Goal
from pdtrim.search.state import Removal


def dense_state(model: Model, target: Target, mode: Mode | None = None) -> Removal:
    """Nothing removed, in a mode other than the target's if one is given."""
    return Removal(num_layers=model.num_layers, mode=mode or target.mode, grain=target.grain)


def ranking_mode(target: Target) -> Mode:
    """``projected`` if each stage is ranked alone, ``unified`` if one ranking serves both."""
    return "projected" if target.mode == "projected" else "unified"


def apply_orders(state: Removal, goal: Goal, orders: Mapping[Stage, Iterable[int]]) -> Removal:
    """Remove each stage's units in their order until its goal is met.

    Args:
        orders: most removable first. Where prefill has none it takes decode's, and so the first
            of those that decode loses.
    """
    for stage in SEARCH_ORDER:
        for unit in orders.get(stage, orders.get("decode", ())):
            if goal.missing(state, stage):
                state = state.remove(stage, unit)
    return state


def open_blocks(name: str, target: Target, num_layers: int, first: int, last: int) -> range:
    """Blocks that may go where the ``first`` and the ``last`` few are protected.

    Raises:
        PlanError: fewer than the target asks for.
    """
    left = range(first, max(num_layers - last, first))
    wanted = max(target.prefill_remove, target.decode_remove)
    if wanted > len(left):
        raise PlanError(
            f"method '{name}' protects the first {first} and the last {last} of {num_layers}"
            f" blocks, so {len(left)} can go, not {wanted}: remove fewer, or change its settings"
        )
    return left
