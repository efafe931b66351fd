"""Which blocks of a stage train, and what of them. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable

from pdtrim.errors import PlanError
from pdtrim.models.block import KEYS_AND_VALUES, Block
from pdtrim.models.model import Model
from pdtrim.plan import Gates
from pdtrim.words import Parts, Stage, Which

Names = dict[int, tuple[str, ...]]
"""Parameters that train, by layer."""


def trainable_layers(which: Which, gates: Gates, merged: Collection[int]) -> tuple[int, ...]:
    """Layers whose decode blocks train, in order.

    Args:
        merged: layers at which a merged block stands; they always train.

    Raises:
        PlanError: decode does not run a merged block, or there is nothing to train.
    """
    kept = set(gates.layers("decode"))
    gone = sorted(set(merged) - kept)
    if gone:
        raise PlanError(f"merged blocks stand at layers {gone}, which decode does not run")
    layers = set(merged)
    if which == "all":
        layers |= kept
    elif which == "neighbours":
        layers |= beside_cuts(gates)
    if not layers:
        raise PlanError(f"'{which}' names no block to train: decode is dense and nothing is merged")
    return tuple(sorted(layers))


def beside_cuts(gates: Gates) -> set[int]:
    """Layers that hold the last part before each of decode's cuts and the first part behind it.

    A part is a block's attention or MLP, a cut a run of parts that decode does not run.
    """
    parts = itertools.chain.from_iterable(
        zip(gates.decode_attention, gates.decode_mlp, strict=True)
    )
    at = [-1, *(i for i, on in enumerate(parts) if on), 2 * gates.num_layers]
    cuts = [pair for pair in itertools.pairwise(at) if pair[1] - pair[0] > 1]
    sides = set(itertools.chain.from_iterable(cuts)) - {-1, 2 * gates.num_layers}
    return {part // 2 for part in sides}


def running(model: Model, gates: Gates, stage: Stage, layers: Iterable[int]) -> Names:
    """Parameters of all parts of some layers that a stage runs."""
    attention, mlp = gates.of(stage)
    names = {}
    for layer in layers:
        parts = model.block(layer).parts(attention=attention[layer], mlp=mlp[layer])
        names[layer] = _below(model, layer, parts)
    return names


def prefill_names(what: Parts, model: Model, gates: Gates) -> Names:
    """Parameters of prefill that train.

    Args:
        gates: without dead work.

    Raises:
        PlanError: prefill skips nothing that keys and values behind it miss.
    """
    cut = first_cut(gates)
    if what == "blocks":
        layers = [i for i in gates.layers("prefill") if i >= max(cut - 1, 0)]
        return running(model, gates, "prefill", layers)
    names = {}
    for layer in range(cut, gates.last_read + 1):
        gate, block = gates.prefill_attention[layer], model.block(layer)
        parts = keys_and_values(block)
        if gate == "off" or (gate == "full" and what != "qkv"):
            continue
        if what != "kv":
            parts = block.KV_PARTS
        if gate == "full":
            parts = (*parts, block.making("queries").name)
        names[layer] = _below(model, layer, parts)
    return names


def first_cut(gates: Gates) -> int:
    """The first layer of which prefill skips a part.

    Args:
        gates: without dead work.

    Raises:
        PlanError: as :func:`prefill_names`.
    """
    skips = (  # that of the last keys and values skips the rest of its block in a dense model too
        i
        for i in range(gates.last_read)
        if gates.prefill_attention[i] != "full" or not gates.prefill_mlp[i]
    )
    cut = next(skips, None)
    if cut is None:
        raise PlanError(
            "prefill skips no block before the last keys and values that decode reads, so there is"
            " nothing to train in it: give a plan with --prefill-remove, or train --stage decode"
        )
    return cut


def keys_and_values(block: Block) -> tuple[str, ...]:
    """Projections that make keys and values. Of one that makes queries too, those of a skipped
    block have no gradient, and stay."""
    return tuple(block.making(made).name for made in KEYS_AND_VALUES)


def _below(model: Model, layer: int, parts: Iterable[str]) -> tuple[str, ...]:
    """Without biases that both stages take from the handed-over pairs (``kv/bias.py``)."""
    block = model.block(layer)
    prefixes = tuple(f"{part}." for part in parts)
    shared = {f"{name}.bias" for name in keys_and_values(block)}
    return tuple(
        name
        for name, _ in block.module.named_parameters()
        if name.startswith(prefixes) and name not in shared
    )
