"""A few layers of a pair at a time, on both stages' streams or on prefill's alone.

Shapes: B sequences, N prefilled and C decoded tokens of one, E hidden width, R tokens.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from pdtrim.plan import Gates, LayerKV, Stage
from pdtrim.stage.forward import Batch, Pair, Trimmed

Entering = tuple[Tensor, Tensor | None]
"""Streams that enter a layer: prefill's ``[B, N, E]`` and decode's ``[B, C, E]``, if it is run."""


def streams_into(pair: Pair, part: Batch, *, decode: bool) -> Entering:
    """The streams that enter layer 0."""
    x_BNE = pair.prefill.embed(part.prefill_ids_BN)
    return x_BNE, pair.decode.embed(part.decode_ids_BC) if decode else None


def run(trimmed: Trimmed, part: Batch, entry: Entering, start: int, stop: int) -> Entering:
    """The streams that enter layer ``stop``, from those that enter ``start``."""
    x_BNE, y_BCE = entry
    if y_BCE is None:
        return trimmed.prefill_stream(part, x_BNE, start=start, stop=stop), None
    if stop < trimmed.gates.num_layers:
        policy = trimmed.policy
        policy = replace(policy, rules=(*policy.rules[:stop], LayerKV()))
        trimmed = replace(trimmed, gates=_ending(trimmed.gates, stop), policy=policy)
    return trimmed.streams(part, resume=[(x_BNE, y_BCE)] * (start + 1), start=start)[stop]


def rows(entry: Entering, stage: Stage) -> Tensor:
    """A stage's stream of an entry, all sequences below one another, ``[R, E]``."""
    stream = entry[0 if stage == "prefill" else 1]
    assert stream is not None, f"{stage} was not run"
    return stream.flatten(0, 1)


def _ending(gates: Gates, stop: int) -> Gates:
    """Gates of the layers before ``stop``, and a reader there: without one prefill would stop."""
    return Gates(
        prefill_attention=(*gates.prefill_attention[:stop], "kv"),
        prefill_mlp=(*gates.prefill_mlp[:stop], False),
        decode_attention=(*gates.decode_attention[:stop], True),
        decode_mlp=(*gates.decode_mlp[:stop], False),
    )
