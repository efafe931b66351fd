"""Train the blocks of a plan that is already chosen: what ``pdtrim distill`` does.

First, where the rule of the two sets says so (``sets.py``), a removed decode block and a kept
neighbour become one block, fitted by local regression. Then decode's blocks, prefill's, or both
are trained on the dense model's log-probabilities. A stage that does not train stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from pdtrim.bundle import TrimPlan
from pdtrim.distill.job import DistillConfig
from pdtrim.distill.merge import MergeConfig, Merged, merge
from pdtrim.distill.sets import SetRule, merges, similarity
from pdtrim.distill.train import Distilled, distill
from pdtrim.distill.trainable import first_cut
from pdtrim.errors import PlanError
from pdtrim.models.model import Model
from pdtrim.models.swap import Blocks
from pdtrim.plan import Gates, PrunePlan
from pdtrim.progress import Progress, silent
from pdtrim.repair.cuts import merged_layers
from pdtrim.search.objective import dense_trace
from pdtrim.stage.forward import Batch, Pair, Trimmed

RULE_ROWS = 8  # sequences on which the rule measures similarity
MERGE_ROWS = 64  # sequences that a merged block is fitted to


@dataclass(frozen=True, kw_only=True)
class Training:
    """Which pairs merge, and how blocks are trained."""

    rule: SetRule = SetRule(reading="none")  # noqa: RUF009 - frozen
    merging: MergeConfig = field(default_factory=MergeConfig)
    distillation: DistillConfig = field(default_factory=DistillConfig)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A plan's gates with merged slots moved, and the trained blocks.

    Attributes:
        merged: pairs that became one block.
        blocks: of both stages; what did not train is as the plan had it.
        text: what was done, in words.
    """

    gates: Gates
    merged: tuple[Merged, ...]
    blocks: Blocks
    distilled: Distilled
    text: str


def train_plan(
    trim: TrimPlan,
    model: Model,
    text: Batch,
    held_out: Batch,
    config: Training,
    *,
    checkpoint: Path | None = None,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda text: None,
) -> Trained:
    """Merge and distil; the same seed gives the same weights on a CPU.

    Args:
        held_out: text that chooses the best weights; not in ``text``.
        checkpoint: a file from which an interrupted training goes on.

    Raises:
        PlanError: nothing to train, narrower blocks, or the checkpoint is not of this run.
    """
    plan = trim.plan
    _check(plan, config)
    before, pair = trim.blocks(model), trim.pair(model)
    gates, merged = plan.gates, []
    for first, second in pairs_of(plan, model, text, config.rule):
        made = merge(model, text[:MERGE_ROWS], first, config.merging, progress=progress)
        say(
            f"blocks {first} and {second} at {made.layer}: relative error"
            f" {made.error_before:.3f} to {made.error_after:.3f}"
        )
        gates = with_slot(gates, made.layer, first + second - made.layer)
        merged.append(made)
    start = dict(before.get("decode", {})) | {made.layer: made.weights for made in merged}
    kept = set(gates.layers("decode"))
    distilled = distill(
        model,
        replace(Trimmed.of(plan, Pair(prefill=pair.prefill, decode=model)), gates=gates),
        text,
        held_out,
        config.distillation,
        start={layer: weights for layer, weights in start.items() if layer in kept},
        checkpoint=checkpoint,
        progress=progress,
        say=say,
    )
    of_prefill = dict(before.get("prefill", {}))
    for layer, weights in distilled.prefill.items():
        of_prefill[layer] = {**of_prefill.get(layer, {}), **weights}
    return Trained(
        gates=gates,
        merged=tuple(merged),
        blocks={"prefill": of_prefill, "decode": distilled.blocks},
        distilled=distilled,
        text=(
            f"{config.distillation.what}, {len(merged)} merged,"
            f" {distilled.history[-1].step} steps on {len(text)} sequences"
        ),
    )


def _check(plan: PrunePlan, config: Training) -> None:
    """Refuse what cannot be trained, before the minutes that merging takes."""
    if plan.widths is not None:
        raise PlanError("training knows whole blocks only: distil a plan without narrower blocks")
    stage = config.distillation.stage
    if stage == "prefill" and config.rule.reading != "none":
        raise PlanError(
            "blocks of decode merge, which does not train: leave merging out, or train both"
        )
    if stage != "decode":
        first_cut(plan.gates.without_dead_work())


def trained_plan(plan: PrunePlan, trained: Trained) -> TrimPlan:
    """The plan with its trained blocks, in memory until it is saved."""
    stands_for = {**merged_layers(trained.gates)}
    stands_for |= {("decode", made.layer): made.merged for made in trained.merged}
    before = plan.provenance.distillation
    text = trained.text if before == "none" else f"{before}; {trained.text}"
    origin = plan.provenance.model_copy(update={"distillation": text, "held_out": None})
    made = plan.model_copy(update={"gates": trained.gates, "provenance": origin})
    return TrimPlan.of(made, trained.blocks, merged=stands_for)


def with_slot(gates: Gates, layer: int, other: int) -> Gates:
    """Decode runs ``layer`` whole and nothing of ``other``; prefill makes the KV that it reads."""
    attention, mlp = list(gates.decode_attention), list(gates.decode_mlp)
    attention[layer] = mlp[layer] = True
    attention[other] = mlp[other] = False
    prefill = list(gates.prefill_attention)
    if prefill[layer] == "off":
        prefill[layer] = "kv"
    return gates.model_copy(
        update={
            "decode_attention": tuple(attention),
            "decode_mlp": tuple(mlp),
            "prefill_attention": tuple(prefill),
        }
    ).without_dead_work()


@torch.inference_mode()
def pairs_of(
    plan: PrunePlan, model: Model, text: Batch, rule: SetRule
) -> tuple[tuple[int, int], ...]:
    """Pairs of decode blocks that the rule merges: one removed, the other kept."""
    if rule.reading == "none":
        return ()
    traces = [dense_trace(model, text[:RULE_ROWS].to(model.device))]
    block_L, pair_L = (similarity(traces, "decode", span=span) for span in (1, 2))
    gone = [
        layer
        for layer in range(model.num_layers)
        if not (plan.gates.decode_attention[layer] or plan.gates.decode_mlp[layer])
    ]
    return merges(gone, rule.distilled(block_L, pair_L))
