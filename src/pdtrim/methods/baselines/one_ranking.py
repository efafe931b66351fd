"""One ranking of the units of all blocks: each block and each part finds a width of its own.

The lowest go until the share of the parameters is reached, each unit counting for what it holds.
One group and one neuron of each block stay. Where the last unit is a group, worth more than what
was missing, the neurons of the highest score come back, so the share is met to within one neuron.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from pdtrim.finite import finite
from pdtrim.methods.baselines.width import Costs, StageCost, Units, UnitScores, each_stage
from pdtrim.models.block import UnitKind
from pdtrim.models.model import Model
from pdtrim.plan import Stage

Unit = tuple[int, UnitKind, int]
"""Layer, kind, index in the block."""


def each_ranked(
    name: str, model: Model, costs: Costs, scores: Mapping[int, UnitScores], *, biased: bool
) -> dict[Stage, dict[int, Units]]:
    """What each stage loses by layer, prefill's inside decode's.

    Args:
        name: of the method, for the error.
        scores: by layer.
        biased: whether the first unit that a layer loses brings its biases.

    Raises:
        PlanError: all that may go is less than a stage must lose.
    """
    order = ranked(scores)
    size: dict[UnitKind, int] = {
        "group": model.num_kv_heads,
        "neuron": model.config.intermediate_size,
    }

    def cut(cost: StageCost, within: list[Unit] | None) -> list[Unit]:
        units = order if within is None else within
        return cut_until_enough(name, cost, units, size, biased=biased)

    return {stage: units_by_layer(units) for stage, units in each_stage(costs, cut).items()}


def ranked(scores: Mapping[int, UnitScores]) -> list[Unit]:
    """Units of all layers, the lowest score first; equals by layer, groups first."""
    units: list[Unit] = []
    for layer, of_layer in scores.items():
        units += [(layer, "group", i) for i in range(len(of_layer.groups_G))]
        units += [(layer, "neuron", i) for i in range(len(of_layer.neurons_F))]
    values = torch.cat([torch.cat((one.groups_G, one.neurons_F)) for one in scores.values()])
    finite(values, "the score of a unit")
    return [units[place] for place in values.cpu().argsort(stable=True).tolist()]


def cut_until_enough(
    name: str, cost: StageCost, order: Sequence[Unit], size: Mapping[UnitKind, int], *, biased: bool
) -> list[Unit]:
    """The first units of an order that save what a stage must lose, but those it can do without.

    Args:
        name: of the method, for the error.
        size: units of each kind in a dense block; one of each stays.
        biased: the first unit of a layer brings its biases.

    Raises:
        PlanError: all that may go is less.
    """
    cut: set[Unit] = set()
    counts: Counter[tuple[int, UnitKind]] = Counter()
    saved, needed = 0, cost.needed

    def worth(unit: Unit) -> int:
        """Parameters that a unit saves beside those that are cut without it."""
        layer, kind, _ = unit
        of_layer = cost.layers[layer]
        alone = biased and not counts[layer, "group"] + counts[layer, "neuron"]
        held = of_layer.group if kind == "group" else of_layer.neuron
        return held - of_layer.bias * alone

    for unit in order:
        if saved >= needed:
            break
        if counts[unit[:2]] < size[unit[1]] - 1:
            saved += worth(unit)
            cut.add(unit)
            counts[unit[:2]] += 1
    if saved < needed:
        raise cost.refuse(name, saved)
    for unit in reversed([unit for unit in order if unit in cut]):
        counts[unit[:2]] -= 1
        if saved - worth(unit) >= needed:
            cut.remove(unit)
            saved -= worth(unit)
        else:
            counts[unit[:2]] += 1
    return [unit for unit in order if unit in cut]


def units_by_layer(cut: Sequence[Unit]) -> dict[int, Units]:
    """The units of each layer that loses any, in the order given."""
    lost: dict[int, dict[UnitKind, list[int]]] = {}
    for layer, kind, index in cut:
        lost.setdefault(layer, {"group": [], "neuron": []})[kind].append(index)
    return {
        layer: Units(groups=tuple(kinds["group"]), neurons=tuple(kinds["neuron"]))
        for layer, kinds in lost.items()
    }
