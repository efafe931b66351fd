"""What every method answers to, so that all are planned, exported and measured alike."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from pdtrim.calibration.batches import Calibration
from pdtrim.errors import PlanError
from pdtrim.models.model import Model
from pdtrim.plan import STAGES, Gates, LayerKV, Mode, Provenance, PrunePlan, Stage
from pdtrim.progress import Progress, silent
from pdtrim.versions import versions

SEARCH_ORDER: tuple[Stage, ...] = ("decode", "prefill")
"""Decode first: it is the sensitive stage, and in mode ``subset`` prefill's set lies in its."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What to remove and what to send.

    Attributes:
        prefill_remove, decode_remove: whole blocks that each stage loses.
        kv: a KV policy (``search/kv_request.py``) or ``budget:compression=X``
            (``search/kv_budget.py``).
        budget: block-tokens that the search may spend; None for the method's own effort.
    """

    prefill_remove: int
    decode_remove: int
    mode: Mode = "projected"
    kv: str = "full"
    seed: int = 0
    block_size: int = 1
    budget: int | None = None

    def remove(self, stage: Stage) -> int:
        """Blocks that a stage loses."""
        return self.prefill_remove if stage == "prefill" else self.decode_remove

    def check(self, model: Model) -> None:
        """Raise PlanError for counts that no plan can meet."""
        for stage in STAGES:
            count = self.remove(stage)
            if not 0 <= count < model.num_layers:
                raise PlanError(
                    f"cannot remove {count} of {model.num_layers} blocks from {stage}:"
                    f" give 0 to {model.num_layers - 1}"
                )
        if self.mode == "subset" and self.prefill_remove > self.decode_remove:
            raise PlanError(
                "mode 'subset' keeps prefill's removed blocks inside decode's: prefill cannot"
                f" lose {self.prefill_remove} when decode loses {self.decode_remove}"
            )


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a method's search ends with."""

    gates: Gates
    kv: tuple[LayerKV, ...]
    block_tokens: int
    kl: float | None = None


class Method(ABC):
    """Makes plans. Subclasses implement :meth:`search`."""

    name: ClassVar[str]
    default_mode: ClassVar[Mode] = "projected"

    @abstractmethod
    def search(
        self, model: Model, calibration: Calibration, target: Target, *, progress: Progress
    ) -> Found:
        """Find gates and a KV policy."""

    def plan(
        self,
        model: Model,
        calibration: Calibration,
        target: Target,
        *,
        progress: Progress = silent,
    ) -> PrunePlan:
        """Search, and record how.

        Raises:
            PlanError: the target cannot be met.
        """
        target.check(model)
        started = time.perf_counter()
        found = self.search(model, calibration, target, progress=progress)
        return PrunePlan(
            model=model.ref,
            gates=found.gates,
            kv=found.kv,
            block_size=target.block_size,
            provenance=Provenance(
                method=self.name,
                mode=target.mode,
                seed=target.seed,
                calibration=calibration.source,
                calibration_hash=calibration.hash,
                search_block_tokens=found.block_tokens,
                search_kl=found.kl,
                wall_s=round(time.perf_counter() - started, 3),
                versions=versions(),
            ),
        )
