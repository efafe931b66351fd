"""What every method answers to, so that all are planned, exported and measured alike."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

from pdtrim.bundle import TrimPlan
from pdtrim.calibration.batches import Calibration
from pdtrim.errors import PlanError
from pdtrim.keep.settings import Settings
from pdtrim.models.model import Model
from pdtrim.models.replace import Blocks
from pdtrim.plan import (
    STAGES,
    Gates,
    LayerKV,
    Mode,
    Provenance,
    PrunePlan,
    Stage,
    Widths,
)
from pdtrim.progress import Progress, silent
from pdtrim.repair.cuts import merged_layers
from pdtrim.search.journal import Journal
from pdtrim.search.state import Grain
from pdtrim.versions import versions

Search = Literal["one_shot", "greedy", "anneal", "evolution", "hybrid"]
Metric = Literal["blocks", "parameters", "flops", "kv_bytes", "latency"]
Repair = Literal["none", "best"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """What to remove and what to send.

    Attributes:
        prefill_remove, decode_remove: whole blocks that each stage loses; for metric ``blocks``.
        kv: a KV policy (``search/kv_request.py``) or ``budget:compression=X``
            (``search/kv_budget.py``).
        budget: block-tokens that the search may spend; None for the method's own effort.
        search: what method ``pdtrim`` searches with.
        grain: whether attention and MLP of a block go together or apart.
        metric: what is counted (``search/goal.py``); all but ``blocks`` go by the shares.
        repair: ``best`` corrects kept blocks for what was cut, in closed form and where held-out
            text says that it helps; their weights then go with the plan. None is the method's
            own: ``best`` where the method can.
        prefill_share, decode_share: shares of its blocks' parameters, its operations or its time
            that each stage must save; with ``kv_bytes``, decode's is the share of the handover's
            bytes, and prefill has none.
    """

    prefill_remove: int = 0
    decode_remove: int = 0
    mode: Mode = "projected"
    kv: str = "full"
    seed: int = 0
    block_size: int = 1
    budget: int | None = None
    search: Search = "hybrid"
    grain: Grain = "block"
    metric: Metric = "blocks"
    repair: Repair | None = None
    prefill_share: float = 0.0
    decode_share: float = 0.0

    def remove(self, stage: Stage) -> int:
        """Blocks that a stage loses."""
        return self.prefill_remove if stage == "prefill" else self.decode_remove

    def check(self, model: Model) -> None:
        """Raise PlanError for counts and shares that no plan can meet."""
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
        if self.mode == "unified" and (
            self.prefill_remove != self.decode_remove or self.prefill_share != self.decode_share
        ):
            raise PlanError("mode 'unified': both stages lose the same, so ask the same of both")
        self._check_shares()

    def _check_shares(self) -> None:
        shares = self.prefill_share, self.decode_share
        if not all(0 <= share < 1 for share in shares):
            raise PlanError(f"shares to save {shares} must be at least 0 and below 1")
        if self.metric == "blocks" and any(shares):
            raise PlanError("metric 'blocks' counts blocks: give no shares, or another metric")
        if self.metric != "blocks" and self.prefill_remove + self.decode_remove:
            raise PlanError(f"metric '{self.metric}' goes by shares: give no counts of blocks")
        if self.metric == "kv_bytes" and self.prefill_share:
            raise PlanError("metric 'kv_bytes' knows decode's share only: prefill saves no bytes")


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a method's search ends with.

    Attributes:
        repair, blocks: what was done to kept blocks, in words, and their weights by stage.
        widths: of blocks that were made narrower; ``blocks`` then holds their biases.
    """

    gates: Gates
    kv: tuple[LayerKV, ...]
    block_tokens: int
    kl: float | None = None
    repair: str = "none"
    blocks: Blocks = field(default_factory=dict)
    widths: Widths | None = None


class Method(ABC):
    """Makes plans. Subclasses implement :meth:`search`."""

    name: ClassVar[str]
    default_mode: ClassVar[Mode] = "projected"
    default_repair: ClassVar[Repair] = "none"

    @abstractmethod
    def search(
        self,
        model: Model,
        calibration: Calibration,
        target: Target,
        *,
        progress: Progress,
        journal: Journal | None,
    ) -> Found:
        """Find gates and a KV policy, and perhaps widths."""

    def plan(
        self,
        model: Model,
        calibration: Calibration,
        target: Target,
        *,
        progress: Progress = silent,
        journal: Path | None = None,
    ) -> TrimPlan:
        """Search, and record how.

        Args:
            journal: a file in which the search's measurements are kept, and from which a search
                that was interrupted goes on.

        Returns:
            The plan with its weights, in memory until it is saved.

        Raises:
            PlanError: the target cannot be met, or the journal belongs to another search.
        """
        if target.repair is None:
            target = replace(target, repair=self.default_repair)
        target.check(model)
        started = time.perf_counter()
        record = None
        if journal is not None:
            record = Journal(journal, self._settings(model, calibration, target))
        found = self.search(model, calibration, target, progress=progress, journal=record)
        provenance = Provenance(
            method=self.name,
            mode=target.mode,
            seed=target.seed,
            calibration=calibration.source,
            calibration_hash=calibration.hash,
            search_block_tokens=found.block_tokens,
            search_kl=found.kl,
            repair=found.repair,
            wall_s=round(time.perf_counter() - started, 3),
            versions=versions(),
        )
        data = {
            "model": model.ref,
            "gates": found.gates,
            "kv": found.kv,
            "block_size": target.block_size,
            "widths": found.widths,
            "provenance": provenance,
        }
        plan = PrunePlan.from_json(data, source=f"method '{self.name}'")
        return TrimPlan.of(plan, found.blocks, merged=merged_layers(found.gates))

    def _settings(self, model: Model, calibration: Calibration, target: Target) -> Settings:
        """Everything that the search's measurements depend on."""
        return {
            "method": repr(self),
            "target": asdict(target),
            "model": model.fingerprint,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "text": {
                "sha256": calibration.hash,
                "prompts": list(calibration.search.prompt_BP.shape),
                "continuations": list(calibration.search.continuation_BC.shape),
                "rerank": len(calibration.rerank),
            },
            "versions": versions(),
        }
