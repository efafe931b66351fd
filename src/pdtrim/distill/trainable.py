"""Which of decode's blocks train. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Collection

from pdtrim.errors import PlanError
from pdtrim.plan import Gates
from pdtrim.words import Which


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
