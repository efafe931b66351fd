"""What a method is asked, made once: the model, the text, what must go, and what travels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from pdtrim.calibration.batches import Calibration
from pdtrim.errors import PlanError
from pdtrim.keep.journal import Journal
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.kvfit.link import FULL
from pdtrim.kvfit.observed import Observed
from pdtrim.kvfit.policy import KVPolicy
from pdtrim.kvfit.sizes import rule_bytes
from pdtrim.models.model import Model
from pdtrim.plan import STAGES, Gates, LayerKV, Mode, Stage
from pdtrim.progress import Progress
from pdtrim.search.goal import Goal, attention_share
from pdtrim.search.latency import measure_latency
from pdtrim.search.objective import LossMaker, Objective, kl_loss
from pdtrim.search.state import Removal
from pdtrim.stage.cost import Lengths
from pdtrim.stage.forward import Batch, Pair, Trimmed
from pdtrim.words import Grain, Metric, Repair, Search

KV_SEQUENCES = 4  # of the calibration text, on which KV policies are fitted and measured


@dataclass(frozen=True, kw_only=True)
class Target:
    """What to remove and what to send.

    Attributes:
        prefill_remove, decode_remove: whole blocks that each stage loses; for metric ``blocks``.
        kv: what travels (``kvfit/policy.py``).
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
        recall: weight of recall beside KL in the loss (``calibration/recall.py``), for methods that
            minimise a KL; 0 leaves it out.
        minutes: how long search and repairs may take; None for the method's own effort.
    """

    prefill_remove: int = 0
    decode_remove: int = 0
    mode: Mode = "projected"
    kv: KVPolicy = FULL
    seed: int = 0
    block_size: int = 1
    budget: int | None = None
    search: Search = "hybrid"
    grain: Grain = "block"
    metric: Metric = "blocks"
    repair: Repair | None = None
    prefill_share: float = 0.0
    decode_share: float = 0.0
    recall: float = 0.0
    minutes: float | None = None

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
        for name, number in (("recall", self.recall), ("minutes", self.minutes or 1.0)):
            if not 0 <= number < math.inf:
                raise PlanError(f"{name} {number:g} must be a number of at least 0")
        if self.minutes == 0:
            raise PlanError("a search takes more than 0 minutes: give more")
        if self.minutes is not None and self.budget is not None:
            raise PlanError("give either minutes or a budget of block-tokens, not both")
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
class Problem:
    """What a method is asked.

    Attributes:
        target: with every choice made.
        rules: the target's KV policy, for this model, fitted on the text.
    """

    model: Model
    text: Calibration
    target: Target
    rules: tuple[LayerKV, ...]
    progress: Progress
    journal: Journal | None
    say: Callable[[str], None] = lambda text: None

    @classmethod
    def of(
        cls,
        model: Model,
        text: Calibration,
        target: Target,
        *,
        progress: Progress,
        journal: Journal | None,
        say: Callable[[str], None] = lambda text: None,
    ) -> Problem:
        """Resolve the KV policy.

        Raises:
            PlanError: counts or shares that no plan can meet, or a KV policy that cannot be had.
        """
        target.check(model)
        sample = text.search[:KV_SEQUENCES]

        def resolve() -> list[dict[str, Any]]:
            rules = target.kv.resolve(
                model, sample, block_size=target.block_size, progress=progress
            )
            return [rule.model_dump(mode="json") for rule in rules]

        key = {"kv": target.kv.text}
        dumped = resolve() if journal is None else journal.once(key, resolve)
        rules = tuple(LayerKV.model_validate(rule) for rule in dumped)
        return cls(
            model=model,
            text=text,
            target=target,
            rules=rules,
            progress=progress,
            journal=journal,
            say=say,
        )

    @property
    def policy(self) -> HandoverPolicy:
        """What travels of the dense model's cache."""
        return HandoverPolicy(rules=self.rules, block_size=self.target.block_size)

    @property
    def batch(self) -> Batch:
        """The search text, on the model's device."""
        return self.text.search.to(self.model.device)

    @cached_property
    def goal(self) -> Goal:
        """What the target's metric makes of its counts or shares, over the text's lengths.

        Measured times go through the journal, so that a resumed search has the same goal.

        Raises:
            PlanError: all units together do not save that much.
        """
        goal = _goal(self)
        units = frozenset(range(len(goal.decode_U)))
        everything = replace(self.dense(), prefill=units, decode=units)
        for stage in STAGES:
            if goal.missing(everything, stage):
                raise PlanError(
                    f"{stage} cannot save that much in {self.target.metric}: ask for less"
                )
        return goal

    def dense(self, mode: Mode | None = None) -> Removal:
        """Nothing removed, in a mode other than the target's if one is given."""
        target = self.target
        layers = self.model.num_layers
        return Removal(num_layers=layers, mode=mode or target.mode, grain=target.grain)

    def objective(
        self,
        *,
        loss: LossMaker = kl_loss,
        start: Trimmed | None = None,
        text: Batch | None = None,
        free: bool = False,
        recall: bool = False,
        pair_of: Callable[[Gates], Pair] | None = None,
    ) -> Objective:
        """The loss of states on a text, under the target's budget and with the journal.

        Args:
            start: what states are cut out of; None is the dense model with all of its KV.
            text: None is the search text.
            free: of the budget.
            recall: with the target's weight of it.
            pair_of: the pair that runs under some gates; None is ``start``'s.
        """
        return Objective(
            self.model,
            self.text.search if text is None else text,
            loss=loss,
            start=start,
            budget=None if free else self.target.budget,
            journal=self.journal,
            recall=self.target.recall if recall else 0.0,
            seed=self.target.seed,
            pair_of=pair_of,
        )

    def narrower(self, model: Model) -> Problem:
        """The same asked of a model with narrower blocks."""
        return replace(self, model=model, journal=None)


def _goal(problem: Problem) -> Goal:
    model, target, policy = problem.model, problem.target, problem.policy
    P, C = problem.text.search.prompt_BP.shape[1], problem.text.search.continuation_BC.shape[1]
    lengths = Lengths(prompt=P, continuation=C)
    prefill_share = 0.0 if target.mode == "unified" else target.prefill_share
    if target.metric == "blocks":
        return Goal.blocks(
            model.num_layers,
            prefill=0 if target.mode == "unified" else target.prefill_remove,
            decode=target.decode_remove,
            grain=target.grain,
            attention=attention_share(model.config, lengths),
        )
    if target.metric == "kv_bytes":
        sizes = _layer_bytes(problem)
        return Goal.kv_bytes(sizes, share=target.decode_share, grain=target.grain)
    if target.metric == "parameters":
        return Goal.parameters(
            model,
            prefill_share=prefill_share,
            decode_share=target.decode_share,
            grain=target.grain,
            mode=target.mode,
            policy=policy,
        )
    if target.metric == "flops":
        return Goal.flops(
            model.config,
            lengths,
            prefill_share=prefill_share,
            decode_share=target.decode_share,
            grain=target.grain,
            mode=target.mode,
            policy=policy,
        )

    def measure() -> list[float]:
        seconds = measure_latency(model, lengths, grain=target.grain, mode=target.mode)
        return seconds["prefill"] + seconds["decode"]

    key = {"seconds": target.grain}
    journal = problem.journal
    values = measure() if journal is None else journal.once(key, measure)
    half = len(values) // 2
    return Goal.latency(
        {"prefill": values[:half], "decode": values[half:]},
        prefill_share=prefill_share,
        decode_share=target.decode_share,
    )


@torch.inference_mode()
def _layer_bytes(problem: Problem) -> list[float]:
    """Bytes that each layer sends of a calibration prompt under its KV rule."""
    model = problem.model
    observed = Observed.of(model, problem.batch[:KV_SEQUENCES])
    views = [observed.view(layer) for layer in range(model.num_layers)]
    return [rule_bytes(view, rule) for view, rule in zip(views, problem.rules, strict=True)]
