"""What a stage costs: block-tokens, the unit of search budgets, and floating-point operations."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from pdtrim.kv.policy import HandoverPolicy
from pdtrim.plan import Gates


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
) -> tuple[float, float]:
    """Operations (2 a multiply-add) of (prefill, decode) for one sequence.

    Matrix products only: projections, scores, mixing, MLP, and decode's head. Prefill runs all
    prompt tokens but the last; decode runs that one and the continuation but its last. Where
    the KV selector decides for each prompt anew, decode is charged for every token.
    """
    width, inner = config.hidden_size, config.intermediate_size
    head_dim = getattr(config, "head_dim", None) or width // config.num_attention_heads
    q_width = config.num_attention_heads * head_dim
    kv = 2 * width * config.num_key_value_heads * head_dim
    qo = 2 * width * q_width
    mlp = 3 * width * inner
    N, C = lengths.prompt - 1, lengths.continuation
    prefill = decode = 0.0
    for layer in range(gates.num_layers):
        gate = gates.prefill_attention[layer]
        if gate != "off":
            prefill += N * kv
        if gate == "full":
            prefill += N * qo + 2 * q_width * N * (N + 1) / 2
        prefill += N * mlp * gates.prefill_mlp[layer]
        if gates.decode_attention[layer]:
            share = policy.share(layer, config.num_key_value_heads, N)
            keys = share * N * C + C * (C + 1) / 2
            decode += C * (kv + qo) + 2 * q_width * keys
        decode += C * mlp * gates.decode_mlp[layer]
    decode += C * width * config.vocab_size
    return 2 * prefill, 2 * decode
