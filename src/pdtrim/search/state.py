"""A search state: the sets of whole blocks that each stage has lost."""

from __future__ import annotations

from dataclasses import dataclass

from pdtrim.plan import Gates, Mode, Stage


@dataclass(frozen=True, kw_only=True)
class Removal:
    """Removed blocks a stage. In mode ``subset`` prefill's lie inside decode's."""

    num_layers: int
    mode: Mode
    prefill: frozenset[int] = frozenset()
    decode: frozenset[int] = frozenset()

    @property
    def gates(self) -> Gates:
        """What runs."""
        return Gates.removing(
            self.num_layers, prefill=self.prefill, decode=self.decode, mode=self.mode
        )

    def of(self, stage: Stage) -> frozenset[int]:
        """The set of one stage."""
        return self.prefill if stage == "prefill" else self.decode

    def removable(self, stage: Stage) -> list[int]:
        """Blocks that the stage may lose next."""
        allowed: set[int] = set(range(self.num_layers))
        if stage == "prefill" and self.mode == "subset":
            allowed = set(self.decode)
        return sorted(allowed - self.of(stage))

    def restorable(self, stage: Stage) -> list[int]:
        """Blocks that the stage may take back."""
        held = self.decode - self.prefill if self.mode == "subset" else self.decode
        return sorted(self.prefill if stage == "prefill" else held)

    def remove(self, stage: Stage, layer: int) -> Removal:
        """The state with one more block gone."""
        return self._with(stage, self.of(stage) | {layer})

    def restore(self, stage: Stage, layer: int) -> Removal:
        """The state with one block back."""
        return self._with(stage, self.of(stage) - {layer})

    def _with(self, stage: Stage, layers: frozenset[int]) -> Removal:
        prefill, decode = (layers, self.decode) if stage == "prefill" else (self.prefill, layers)
        return Removal(num_layers=self.num_layers, mode=self.mode, prefill=prefill, decode=decode)
