"""What every method answers to, so that all are planned, exported and measured alike."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import ClassVar, get_args

from pdtrim.bundle import TrimPlan
from pdtrim.calibration.batches import Calibration
from pdtrim.calibration.recall import LEAST, sequence_tokens
from pdtrim.errors import PlanError
from pdtrim.keep.journal import Journal
from pdtrim.keep.settings import Settings
from pdtrim.methods.problem import Problem, Target
from pdtrim.models.model import Model
from pdtrim.models.swap import Blocks
from pdtrim.plan import (
    Gates,
    HeldOutScore,
    Mode,
    Provenance,
    PrunePlan,
    Widths,
)
from pdtrim.progress import Progress, silent
from pdtrim.repair.cuts import merged_layers
from pdtrim.repair.held_out import HeldOut
from pdtrim.search.objective import BudgetSpent
from pdtrim.stage.forward import Trimmed
from pdtrim.versions import versions
from pdtrim.words import Grain, Metric, Repair


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a method's search ends with.

    Attributes:
        repair, blocks: what was done to kept blocks, in words, and their weights by stage.
        widths: of blocks that were made narrower; ``blocks`` then holds their biases.
    """

    gates: Gates
    block_tokens: int
    kl: float | None = None
    recall: float | None = None
    repair: str = "none"
    blocks: Blocks = field(default_factory=dict)
    widths: Widths | None = None


@dataclass(frozen=True, kw_only=True)
class Split:
    """How a comparison splits a mean share: each stage loses this many times it.

    Attributes:
        name: what the method's name is followed by.
        below: the split is left out where a stage would lose this share or more.
    """

    name: str
    mode: Mode
    prefill: float
    decode: float
    below: float = 1.0


class Method(ABC):
    """Makes plans. Subclasses implement :meth:`solve`.

    Attributes:
        splits: in which a comparison runs the method beside mode ``unified``.
        modes, grains, metrics, repairs: what the method knows; anything else is refused here. A
            target's grain ``block`` is also what no choice looks like, so a method that knows
            ``part`` only takes that.
    """

    name: ClassVar[str]
    default_mode: ClassVar[Mode] = "projected"
    default_repair: ClassVar[Repair] = "none"
    paced: ClassVar[bool] = False
    """Whether it can be held to minutes."""
    modes: ClassVar[tuple[Mode, ...]] = ("projected", "subset", "unified")
    grains: ClassVar[tuple[Grain, ...]] = ("block", "part")
    metrics: ClassVar[tuple[Metric, ...]] = get_args(Metric)
    repairs: ClassVar[tuple[Repair, ...]] = ("none",)
    splits: ClassVar[tuple[Split, ...]] = ()

    @abstractmethod
    def solve(self, problem: Problem) -> Found:
        """Find gates, and perhaps widths and weights.

        Raises:
            PlanError: the method finds nothing that does what is asked.
            BudgetSpent: the target's budget does not suffice.
        """

    def plan(
        self,
        model: Model,
        calibration: Calibration,
        target: Target,
        *,
        progress: Progress = silent,
        journal: Path | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> TrimPlan:
        """Search, and record how.

        Args:
            journal: a file in which the search's measurements are kept, and from which a search
                that was interrupted goes on.
            say: takes a line for people.

        Returns:
            The plan with its weights, in memory until it is saved.

        Raises:
            PlanError: the target cannot be met, or the journal belongs to another search.
        """
        target = self.own(target)
        target.check(model)
        started = time.perf_counter()
        record = None
        if journal is not None:
            record = Journal(journal, self._settings(model, calibration, target))
        problem = Problem.of(model, calibration, target, progress=progress, journal=record, say=say)
        found = self.solved(problem)
        provenance = Provenance(
            method=self.name,
            mode=target.mode,
            seed=target.seed,
            calibration=calibration.source,
            calibration_hash=calibration.hash,
            search_block_tokens=found.block_tokens,
            search_kl=found.kl,
            search_recall=found.recall,
            recall_weight=0.0 if found.recall is None else target.recall,
            repair=found.repair,
            wall_s=round(time.perf_counter() - started, 3),
            versions=versions(),
        )
        data = {
            "model": model.ref,
            "gates": found.gates,
            "kv": problem.rules,
            "block_size": target.block_size,
            "widths": found.widths,
            "provenance": provenance,
        }
        plan = PrunePlan.from_json(data, source=f"method '{self.name}'")
        made = TrimPlan.of(plan, found.blocks, merged=merged_layers(found.gates))
        return replace(made, plan=_judged(made, problem))

    def own(self, target: Target) -> Target:
        """The target with the method's own choices where it makes none.

        Raises:
            PlanError: the target asks for what the method does not know.
        """
        if target.repair is None:
            target = replace(target, repair=self.default_repair)
        if target.grain == "block" and "block" not in self.grains:
            target = replace(target, grain=self.grains[0])
        if target.minutes is not None and not self.paced:
            raise PlanError(
                f"method '{self.name}' cannot be held to minutes: leave them out, or give a budget"
            )
        known: dict[str, tuple[str, ...]] = {
            "mode": self.modes,
            "grain": self.grains,
            "metric": self.metrics,
            "repair": self.repairs,
        }
        for what, values in known.items():
            asked = getattr(target, what)
            if asked not in values:
                raise PlanError(
                    f"method '{self.name}' does not know {what} '{asked}': use {what}"
                    f" {' or '.join(values)}"
                )
        return target

    def solved(self, problem: Problem) -> Found:
        """:meth:`solve`, a budget that does not suffice as the user's error."""
        try:
            return self.solve(problem)
        except BudgetSpent as error:
            asked = problem.target
            limit = f"a budget of {asked.budget} block-tokens does"
            if asked.minutes is not None:
                limit = f"{asked.minutes:g} minutes do"
            raise PlanError(
                f"{limit} not reach the end of method '{self.name}': give more, fewer blocks to"
                " remove, or less calibration text"
            ) from error

    def _settings(self, model: Model, calibration: Calibration, target: Target) -> Settings:
        """Everything that the search's measurements depend on."""
        return {
            "method": repr(self),
            "target": asdict(target),
            "model": model.fingerprint,
            "dtype": model.dtype_name,
            "device": str(model.device),
            "text": {
                "sha256": calibration.hash,
                "prompts": list(calibration.search.prompt_BP.shape),
                "continuations": list(calibration.search.continuation_BC.shape),
                "rerank": len(calibration.rerank),
            },
            "versions": versions(),
        }


def _judged(made: TrimPlan, problem: Problem) -> PrunePlan:
    """The plan with what its pair costs on the re-rank text, if there is any."""
    plan, text = made.plan, problem.text.rerank
    if len(text) == 0:
        return plan
    weight = problem.target.recall if sequence_tokens(text) >= LEAST else None
    judge = HeldOut(problem.model, text, weight=weight, seed=problem.target.seed)
    score = judge.score(Trimmed.of(plan, made.pair(problem.model)))
    held_out = HeldOutScore(kl=score.kl, recall=score.recall, kls=score.kls)
    return plan.model_copy(
        update={"provenance": plan.provenance.model_copy(update={"held_out": held_out})}
    )
