"""Seconds that each unit of each stage takes on the model's device, for ``Goal.latency``.

Shapes: T tokens, E hidden width.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from pdtrim.clock import timed
from pdtrim.kv.policy import HandoverPolicy, hand_over
from pdtrim.models.model import Model
from pdtrim.plan import STAGES, AttentionGate, Mode, Stage
from pdtrim.stage.cache import LayerCache
from pdtrim.stage.cost import Lengths
from pdtrim.stage.step import decode_block, prefill_block
from pdtrim.words import Grain

Key = tuple[Stage, int, str]
Prepare = Callable[[], Callable[[], object]]
"""Makes what a run uses up, and gives the run."""


@torch.inference_mode()
def measure_latency(
    model: Model,
    lengths: Lengths,
    *,
    grain: Grain = "block",
    mode: Mode = "projected",
    repeats: int = 5,
) -> dict[Stage, list[float]]:
    """Median seconds a unit of one sequence, over interleaved rounds behind one that warms up.

    Prefill runs the prompt but its last token; decode runs one token in the middle of the
    continuation, with all KV there. In mode ``projected`` an attention that prefill skips still
    makes keys and values, so its saving is what it takes beyond them, at least 0.
    """
    times: dict[Key, list[float]] = {}
    for repeat in range(repeats + 1):
        for layer in range(model.num_layers):
            for key, prepare in _parts(model, lengths, layer).items():
                seconds = timed(prepare(), model.device)
                if repeat:
                    times.setdefault(key, []).append(seconds)
    median = {key: statistics.median(values) for key, values in times.items()}
    found: dict[Stage, list[float]] = {}
    for stage in STAGES:
        found[stage] = []
        for layer in range(model.num_layers):
            attention, mlp = median[stage, layer, "attention"], median[stage, layer, "mlp"]
            if stage == "prefill" and mode == "projected":
                attention = max(attention - median[stage, layer, "kv"], 0.0)
            found[stage] += [attention + mlp] if grain == "block" else [attention, mlp]
    return found


def _parts(model: Model, lengths: Lengths, layer: int) -> dict[Key, Prepare]:
    """What is timed of a layer; each entry first makes what its run uses up."""
    block = model.block(layer)
    N, past = lengths.prompt - 1, lengths.prompt + lengths.continuation // 2
    at_T = torch.arange(past + 1, device=model.device)[None]
    ids_T = at_T % model.config.vocab_size
    x_TE = model.embed(ids_T)

    def prefill(attention: AttentionGate, mlp: bool, tokens: int = N) -> tuple[Tensor, object]:
        rope = model.rope(at_T[:, :tokens])
        return prefill_block(
            block, x_TE[:, :tokens], rope, model.rope, attention=attention, mlp=mlp
        )

    def decode(attention: bool, mlp: bool) -> Callable[[], object]:
        cache = None
        if attention:
            rope = model.rope(at_T[:, :past])
            _, view = prefill_block(
                block, x_TE[:, :past], rope, model.rope, attention="kv", mlp=False
            )
            assert view is not None
            groups = hand_over(HandoverPolicy.full(model.num_layers), layer, view)
            cache = LayerCache(groups, capacity=1, window=block.window)
        at = at_T[:, past:]
        rope = model.rope(at)
        y = x_TE[:, past:]
        return lambda: decode_block(block, y, rope, at, cache, attention=attention, mlp=mlp)

    return {
        ("prefill", layer, "attention"): lambda: lambda: prefill("full", False),
        ("prefill", layer, "kv"): lambda: lambda: prefill("kv", False),
        ("prefill", layer, "mlp"): lambda: lambda: prefill("off", True),
        ("decode", layer, "attention"): lambda: decode(True, False),
        ("decode", layer, "mlp"): lambda: decode(False, True),
    }
