"""One ratio for every block that may become narrower: how many groups and neurons each loses.

Of each block's G groups the nearest whole number to the ratio goes, the same from every block, and
then as many neurons, spread evenly over the blocks, as the parameters still missing are worth. So
the share is met to within one neuron. Where neurons cannot make up the difference, another number
of groups does, the nearest that can.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pdtrim.methods.baselines.width import (
    Costs,
    Lost,
    Narrowed,
    StageCost,
    Units,
    each_stage,
)
from pdtrim.models.model import Model
from pdtrim.plan import STAGES, Stage

Counts = Mapping[int, tuple[int, int]]
"""By layer, how many groups and how many neurons."""


def each_uniform(
    name: str, model: Model, costs: Costs, layers: Sequence[int]
) -> dict[Stage, Counts]:
    """Counts of each stage, prefill's inside decode's.

    Args:
        name: of the method, for the error.
        layers: those that may become narrower, not none.

    Raises:
        PlanError: all that may go is less than a stage must lose.
    """
    size = model.num_kv_heads, model.config.intermediate_size
    return each_stage(costs, lambda cost, within: uniform_counts(name, cost, layers, size, within))


def without_first(orders: Mapping[int, Units], counts: Mapping[Stage, Counts]) -> Narrowed:
    """So many of each layer's units, the first in its order, gone from each stage."""
    lost: dict[Stage, Lost] = {
        stage: {layer: orders[layer].first(*of_layer) for layer, of_layer in counts[stage].items()}
        for stage in STAGES
    }
    return Narrowed(lost=lost)


def evenly(total: int, layers: Sequence[int]) -> dict[int, int]:
    """A total over layers, evenly; the first ones take what does not divide."""
    each, more = divmod(total, len(layers)) if layers else (0, 0)
    return {layer: each + (place < more) for place, layer in enumerate(layers)}


def uniform_counts(
    name: str, cost: StageCost, layers: Sequence[int], size: tuple[int, int], within: Counts | None
) -> Counts:
    """Counts that save what the stage must lose, and not a neuron more if there is such a choice.

    Args:
        name: of the method, for the error.
        layers: those that may become narrower, not none.
        size: groups and neurons of a dense block; one of each stays.
        within: what decode loses, for prefill, from the same layers.

    Raises:
        PlanError: all that may go is less.
    """
    most = within or {layer: (size[0] - 1, size[1] - 1) for layer in layers}
    held = cost.saved(dict.fromkeys(layers, size))
    wanted = cost.needed / held * size[0] * len(layers) if held else 0.0
    served = [layer for layer in layers if cost.layers[layer].neuron]
    price = cost.layers[served[0]].neuron if served else 1
    room = sum(most[layer][1] for layer in served)

    def options() -> list[tuple[int, bool, float, int, int]]:
        found = []
        for total in range(sum(groups for groups, _ in most.values()) + 1):
            groups = evenly(total, layers)
            missing = cost.needed - cost.saved({i: (count, 0) for i, count in groups.items()})
            neurons = max(math.ceil(missing / price), 0)
            if neurons <= room:
                uneven = total % len(layers) > 0
                found.append((max(-missing, 0), uneven, abs(total - wanted), total, neurons))
        return found

    best = min(options(), default=None)
    if best is None:
        raise cost.refuse(name, cost.saved(most))
    groups, neurons = evenly(best[3], layers), evenly(best[4], served)
    return {layer: (groups[layer], neurons.get(layer, 0)) for layer in layers}
