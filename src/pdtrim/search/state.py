"""A search state: the sets of units that each stage has lost.

A unit is a whole block (grain ``block``: unit u is layer u) or a part of one (grain ``part``: unit
2 * layer is that layer's attention, 2 * layer + 1 its MLP).
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace

from pdtrim.errors import PlanError
from pdtrim.plan import Gates, Mode, Stage
from pdtrim.words import Grain


@dataclass(frozen=True, kw_only=True)
class Removal:
    """Removed units a stage.

    In mode ``subset`` prefill's lie inside decode's; in mode ``unified`` they are decode's, and
    move with them.
    """

    num_layers: int
    mode: Mode
    grain: Grain = "block"
    prefill: frozenset[int] = frozenset()
    decode: frozenset[int] = frozenset()

    @property
    def num_units(self) -> int:
        """Units of a stage."""
        return self.num_layers * units_per_layer(self.grain)

    @property
    def gates(self) -> Gates:
        """What runs."""
        if self.grain == "block":
            return Gates.removing(
                self.num_layers, prefill=self.prefill, decode=self.decode, mode=self.mode
            )
        extra = sorted(self.prefill - self.decode)
        if self.mode == "subset" and extra:
            raise PlanError(f"mode 'subset': prefill removes parts {extra}, which decode keeps")
        return Gates.without(
            self.num_layers,
            attention=(_layers(self.prefill, 0), _layers(self.decode, 0)),
            mlp=(_layers(self.prefill, 1), _layers(self.decode, 1)),
        )

    def of(self, stage: Stage) -> frozenset[int]:
        """The set of one stage."""
        return self.prefill if stage == "prefill" else self.decode

    def removable(self, stage: Stage) -> list[int]:
        """Units that the stage may lose next."""
        if stage == "prefill" and self.mode == "unified":
            return []
        allowed: set[int] = set(range(self.num_units))
        if stage == "prefill" and self.mode == "subset":
            allowed = set(self.decode)
        return sorted(allowed - self.of(stage))

    def restorable(self, stage: Stage) -> list[int]:
        """Units that the stage may take back."""
        if stage == "prefill" and self.mode == "unified":
            return []
        held = self.decode - self.prefill if self.mode == "subset" else self.decode
        return sorted(self.prefill if stage == "prefill" else held)

    def remove(self, stage: Stage, unit: int) -> Removal:
        """The state with one more unit gone."""
        return self._with(stage, self.of(stage) | {unit})

    def restore(self, stage: Stage, unit: int) -> Removal:
        """The state with one unit back."""
        return self._with(stage, self.of(stage) - {unit})

    def _with(self, stage: Stage, units: frozenset[int]) -> Removal:
        if self.mode == "unified":
            return replace(self, prefill=units, decode=units)
        if stage == "prefill":
            return replace(self, prefill=units)
        return replace(self, decode=units)


def units_per_layer(grain: Grain) -> int:
    """Units that a layer is made of."""
    return 1 if grain == "block" else 2


def _layers(units: Set[int], part: int) -> set[int]:
    """Layers whose attention (part 0) or MLP (part 1) is among the units."""
    return {unit // 2 for unit in units if unit % 2 == part}
