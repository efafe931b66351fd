"""From a target to the goal that the searches work for."""

from __future__ import annotations

import torch

from pdtrim.calibration.batches import Calibration
from pdtrim.errors import PlanError
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.methods.base import Target
from pdtrim.models.model import Model
from pdtrim.plan import STAGES, Gates
from pdtrim.search.goal import Goal, attention_share
from pdtrim.search.journal import Journal
from pdtrim.search.kv_budget import KV_SEQUENCES, rule_bytes
from pdtrim.search.kv_request import prompt_and_queries
from pdtrim.search.latency import measure_latency
from pdtrim.search.state import Removal
from pdtrim.stage.cost import Lengths
from pdtrim.stage.forward import Pair, streams


def goal_of(
    target: Target,
    model: Model,
    calibration: Calibration,
    policy: HandoverPolicy,
    journal: Journal | None = None,
) -> Goal:
    """What the target's metric makes of its counts or shares; lengths are the calibration's.

    Measured times go through the journal, so that a resumed search has the same goal.

    Raises:
        PlanError: all units together do not save that much.
    """
    batch = calibration.search
    lengths = Lengths(prompt=batch.prompt_BP.shape[1], continuation=batch.continuation_BC.shape[1])
    goal = _goal(target, model, calibration, policy, lengths, journal)
    units = frozenset(range(len(goal.decode_U)))
    everything = Removal(
        num_layers=model.num_layers,
        mode=target.mode,
        grain=target.grain,
        prefill=units,
        decode=units,
    )
    for stage in STAGES:
        if goal.missing(everything, stage):
            raise PlanError(f"{stage} cannot save that much in {target.metric}: ask for less")
    return goal


def _goal(
    target: Target,
    model: Model,
    calibration: Calibration,
    policy: HandoverPolicy,
    lengths: Lengths,
    journal: Journal | None,
) -> Goal:
    if target.metric == "blocks":
        return Goal.blocks(
            model.num_layers,
            prefill=0 if target.mode == "unified" else target.prefill_remove,
            decode=target.decode_remove,
            grain=target.grain,
            attention=attention_share(model.config, lengths),
        )
    if target.metric == "kv_bytes":
        sizes = layer_bytes(model, calibration, policy)
        return Goal.kv_bytes(sizes, share=target.decode_share, grain=target.grain)
    if target.metric == "parameters":
        return Goal.parameters(
            model,
            prefill_share=0.0 if target.mode == "unified" else target.prefill_share,
            decode_share=target.decode_share,
            grain=target.grain,
            mode=target.mode,
            policy=policy,
        )
    if target.metric == "flops":
        return Goal.flops(
            model.config,
            lengths,
            prefill_share=0.0 if target.mode == "unified" else target.prefill_share,
            decode_share=target.decode_share,
            grain=target.grain,
            mode=target.mode,
            policy=policy,
        )

    def measure() -> list[float]:
        seconds = measure_latency(model, lengths, grain=target.grain, mode=target.mode)
        return seconds["prefill"] + seconds["decode"]

    key = {"seconds": target.grain}
    values = measure() if journal is None else journal.once(key, measure)
    half = len(values) // 2
    return Goal.latency(
        {"prefill": values[:half], "decode": values[half:]},
        prefill_share=0.0 if target.mode == "unified" else target.prefill_share,
        decode_share=target.decode_share,
    )


@torch.inference_mode()
def layer_bytes(model: Model, calibration: Calibration, policy: HandoverPolicy) -> list[float]:
    """Bytes that each layer sends of a calibration prompt under its KV rule."""
    batch = calibration.search[:KV_SEQUENCES].to(model.device)
    trace = streams(Pair.dense(model), batch, Gates.dense(model.num_layers))
    views = [prompt_and_queries(model, batch, trace, layer)[0] for layer in range(model.num_layers)]
    return [rule_bytes(view, rule) for view, rule in zip(views, policy.rules, strict=True)]
