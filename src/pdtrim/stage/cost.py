"""What a stage costs: block-tokens, the unit of search budgets, operations, and parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

from pdtrim.kv.policy import HandoverPolicy
from pdtrim.models.block import Products
from pdtrim.models.checkpoint import held_parts
from pdtrim.models.families import family_of
from pdtrim.models.model import Model
from pdtrim.models.narrow import outline
from pdtrim.plan import STAGES, Gates, LayerKV, PrunePlan, Stage, Width, Widths


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of a prompt and of its continuation."""

    prompt: int
    continuation: int


def block_tokens(gates: Gates, *, sequences: int, prefill: int, decode: int, start: int = 0) -> int:
    """Tokens that pass through a block, summed over blocks that a run from ``start`` enters.

    Args:
        prefill, decode: tokens a sequence in each stage.
    """
    gates = gates.without_dead_work()
    count = sum(prefill for layer in gates.layers("prefill") if layer >= start)
    count += sum(decode for layer in gates.layers("decode") if layer >= start)
    return sequences * count


def stage_flops(
    config: PreTrainedConfig,
    gates: Gates,
    policy: HandoverPolicy,
    lengths: Lengths,
    *,
    widths: Widths | None = None,
) -> tuple[float, float]:
    """Operations (2 a multiply-add) of (prefill, decode) for one sequence.

    Matrix products only: projections, scores, mixing, MLP, and decode's head. Prefill runs all
    prompt tokens but the last; decode runs that one and the continuation but its last. Where
    the KV selector decides for each prompt anew, decode is charged for every token.

    Args:
        widths: of the plan; None if all blocks are whole.
    """
    sizes = {stage: _layer_sizes(config, gates, widths, stage) for stage in STAGES}
    N, C = lengths.prompt - 1, lengths.continuation
    prefill = decode = 0.0
    for layer in range(gates.num_layers):
        gate, size = gates.prefill_attention[layer], sizes["prefill"][layer]
        if gate != "off":
            prefill += N * size.kv
        if gate == "full":
            prefill += N * size.qo + 2 * size.q_width * N * (N + 1) / 2
        prefill += N * size.mlp * gates.prefill_mlp[layer]
        size = sizes["decode"][layer]
        if gates.decode_attention[layer]:
            share = policy.share(layer, size.groups, N)
            keys = share * N * C + C * (C + 1) / 2
            decode += C * (size.kv + size.qo) + 2 * size.q_width * keys
        decode += C * size.mlp * gates.decode_mlp[layer]
    decode += C * config.hidden_size * config.vocab_size
    return 2 * prefill, 2 * decode


def _layer_sizes(
    config: PreTrainedConfig, gates: Gates, widths: Widths | None, stage: Stage
) -> list[Products]:
    def size(width: Width | None) -> Products:
        return family_of(config).products(
            config,
            groups=len(width.groups) if width else config.num_key_value_heads,
            neurons=len(width.kept_neurons) if width else config.intermediate_size,
        )

    return [size(width) for width in (widths.of(stage) if widths else [None] * gates.num_layers)]


def removed_parameters(model: Model, plan: PrunePlan) -> dict[Stage, float]:
    """The share of its blocks' parameters that each stage's checkpoint no longer holds.

    ``1 - held / held_dense``, both without work that nothing reads and both under the plan's KV
    policy, so that a plan that removes nothing has 0 in both stages. Embedding, head and last
    norm are not counted.

    Args:
        model: the plan's dense model.

    Raises:
        PlanError: a width names a head or a neuron that the model does not have.
    """
    held = block_parameters(model, plan.gates, plan.kv, widths=plan.widths)
    whole = block_parameters(model, Gates.dense(model.num_layers), plan.kv)
    return {stage: 1 - held[stage] / whole[stage] for stage in STAGES}


def block_parameters(
    model: Model, gates: Gates, rules: Sequence[LayerKV], *, widths: Widths | None = None
) -> dict[Stage, int]:
    """How many parameters of its blocks each stage's checkpoint holds, dead work left out.

    Args:
        model: the dense model.
        rules: the KV rule of each layer; a selector may keep parameters that no gate needs.

    Raises:
        PlanError: a width names a head or a neuron that the model does not have.
    """
    gates = gates.without_dead_work()
    held: dict[Stage, int] = {"prefill": 0, "decode": 0}
    for stage in STAGES:
        for layer in gates.layers(stage):
            parts = held_parts(model.config, gates, rules, stage, layer)
            names = tuple(f"{part}." for part in parts)
            width = widths.of(stage)[layer] if widths else None
            block = outline(model, layer, width) if width else model.block(layer).module
            held[stage] += sum(
                part.numel() for name, part in block.named_parameters() if name.startswith(names)
            )
    return held
