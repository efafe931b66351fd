"""The dense fleet beside the pruned one: machines, money, break-even, and what moves the saving."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from pdtrim.cost.fleet import Fleet, Unreachable
from pdtrim.errors import PdtrimError

HOURS_A_YEAR = 8760


@dataclass(frozen=True, kw_only=True)
class Side:
    """A fleet, or why there is none."""

    fleet: Fleet | None
    reason: str | None = None

    def money_a_year(self, gpu_hour: float) -> float | None:
        """Of its GPUs, all hours of a year."""
        return None if self.fleet is None else self.fleet.gpus * gpu_hour * HOURS_A_YEAR

    def to_json(self, gpu_hour: float, gpu_watts: float | None) -> dict[str, Any]:
        """Plain data."""
        if self.fleet is None:
            return {"reached": False, "reason": self.reason}
        gpus, data = self.fleet.gpus, asdict(self.fleet)
        hours = gpus * HOURS_A_YEAR
        data |= {"gpus": gpus, "gpu_hours_a_year": hours, "money_a_year": hours * gpu_hour}
        if gpu_watts is not None:
            data["kwh_a_year"] = hours * gpu_watts / 1e3
        return {"reached": True, **data}


def side(size: Callable[[], Fleet]) -> Side:
    """A fleet that may be out of reach."""
    try:
        return Side(fleet=size())
    except Unreachable as error:
        return Side(fleet=None, reason=str(error))


def saving_a_year(dense: Side, pruned: Side, gpu_hour: float) -> float | None:
    """Money; None where one of the two meets no target."""
    before, after = dense.money_a_year(gpu_hour), pruned.money_a_year(gpu_hour)
    return None if before is None or after is None else before - after


def break_even_hours(work_cost: float, saving: float | None) -> float | None:
    """Hours of serving until the work to prune is paid; None if it never is."""
    return work_cost / saving * HOURS_A_YEAR if saving and saving > 0 else None


def sensitivity(
    inputs: dict[str, float], change: float, saving: Callable[[dict[str, float]], float | None]
) -> list[dict[str, Any]]:
    """The yearly saving with each input lower and higher by a share, the others as they are.

    An entry's ``low`` and ``high`` are None, with the reason, where there is no such fleet or
    nothing is measured.
    """
    rows = []
    for name, value in inputs.items():
        row: dict[str, Any] = {"input": name, "value": value}
        for end, factor in (("low", 1 - change), ("high", 1 + change)):
            try:
                row[end] = saving({**inputs, name: value * factor})
                if row[end] is None:
                    row[f"{end}_reason"] = "a fleet misses its targets"
            except PdtrimError as error:
                row[end], row[f"{end}_reason"] = None, str(error)
        rows.append(row)
    return rows
