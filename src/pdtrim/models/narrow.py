"""A model whose blocks are narrower: KV heads with their query heads, and MLP neurons, cut out.

Cutting a head or a neuron out of the weights equals multiplying its output by zero. The slices are
copies; every other weight is shared with the original.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pdtrim.errors import PlanError
from pdtrim.models.block import Block
from pdtrim.models.model import Model
from pdtrim.models.swap import own_blocks
from pdtrim.plan import PrunePlan, Stage, Width


def narrow_blocks(model: Model, widths: Mapping[int, Width]) -> Model:
    """A copy of a dense model with narrower blocks at the dense layer indices named.

    Raises:
        PlanError: a head or a neuron that the block does not have.
    """
    network = own_blocks(model, widths)
    for layer, width in widths.items():
        narrow(type(model.block(layer))(network.model.layers[layer]), width, layer=layer)
    return model.like(network)


def narrow_stage(model: Model, plan: PrunePlan, stage: Stage) -> Model:
    """A dense model as narrow as a plan has it in one stage; the model itself if nothing is.

    Raises:
        PlanError: a width names a head or a neuron that the model does not have.
    """
    layers = range(model.num_layers)
    widths = {i: width for i in layers if (width := plan.width(stage, i)) is not None}
    return narrow_blocks(model, widths) if widths else model


def outline(model: Model, layer: int, width: Width | None) -> Any:
    """A dense block at a width, on the meta device: names and shapes, but no numbers.

    Raises:
        PlanError: a head or a neuron that the block does not have.
    """
    module = model.block(layer).module
    bare = {
        id(part): nn.Parameter(torch.empty_like(part, device="meta"), requires_grad=False)
        for part in module.parameters()
    }
    block = copy.deepcopy(module, bare)
    if width is not None:
        narrow(type(model.block(layer))(block), width, layer=layer)
    return block


def narrow(block: Block, width: Width, *, layer: int) -> None:
    """Cut one block to a width, in place.

    Args:
        layer: what an error calls it.

    Raises:
        PlanError: a head or a neuron that the block does not have.
    """
    kept = {"group": width.groups, "neuron": width.kept_neurons}
    units = {p: block.units(p) for p in block.PROJECTIONS}
    sizes = {p.unit: len(parts[0]) for p, parts in units.items()}
    if any(kept[unit][-1] >= size for unit, size in sizes.items()):
        raise PlanError(
            f"layer {layer} has {sizes['group']} KV heads and {sizes['neuron']} MLP neurons: its"
            " width names more"
        )
    for projection, parts in units.items():
        own = torch.cat([part[list(kept[projection.unit])].flatten() for part in parts]).tolist()
        path, _, leaf = projection.name.rpartition(".")
        module, old = block.module.get_submodule(path), block.matrix(projection.makes[0])
        made = _columns(old, own, biased=width.biased) if projection.writes else _rows(old, own)
        setattr(module, leaf, made)


def channels(units: Sequence[int], size: int) -> list[int]:
    """Channels of units of equal size that lie one after the other."""
    return [unit * size + i for unit in units for i in range(size)]


def _rows(linear: nn.Linear, rows: list[int]) -> nn.Linear:
    """The outputs named."""
    return _linear(linear.weight[rows], None if linear.bias is None else linear.bias[rows])


def _columns(linear: nn.Linear, columns: list[int], *, biased: bool) -> nn.Linear:
    """The inputs named; a bias that is missing but wanted starts at 0."""
    bias: Tensor | None = linear.bias
    if biased and bias is None:
        bias = torch.zeros_like(linear.weight[:, 0])
    return _linear(linear.weight[:, columns], bias)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    outputs, inputs = weight.shape
    made = nn.Linear(inputs, outputs, bias=bias is not None, device="meta", dtype=weight.dtype)
    made.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return made
