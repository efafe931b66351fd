"""A model in which some blocks have other weights; everything else is shared with the original."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from pdtrim.finite import finite
from pdtrim.models.model import Model
from pdtrim.plan import STAGES, Stage

Weights = dict[str, Tensor]
"""Parameters of one block, by their names below it, such as ``mlp.down_proj.weight``."""

Blocks = dict[Stage, dict[int, Weights]]
"""Such parameters by stage and dense layer index."""


def swap_blocks(model: Model, blocks: Mapping[int, Weights]) -> Model:
    """A copy of a model of all layers with other weights in the blocks named.

    Args:
        blocks: by dense layer index; parameters that are left out stay shared with ``model``.

    Raises:
        ValueError: a parameter that the block does not have, of another shape, or that is NaN or
            infinite in the model's type.
    """
    network = own_blocks(model, blocks)
    for layer, weights in blocks.items():
        module = network.model.layers[layer]
        for name, tensor in weights.items():
            _put(module, layer, name, tensor.to(model.device, model.dtype))
    return model.like(network)


def own_blocks(model: Model, layers: Iterable[int]) -> Any:
    """The network with modules of its own at some layers; weights, and all else, are shared."""
    own = {id(model.block(layer).module) for layer in layers}
    shared = {
        id(part): part for part in (*model.network.parameters(), *model.network.buffers())
    } | {id(layer): layer for layer in model.network.model.layers if id(layer) not in own}
    return copy.deepcopy(model.network, shared)


def _put(block: nn.Module, layer: int, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    try:
        owner = block.get_submodule(path)
    except AttributeError:
        raise ValueError(f"layer {layer} has no part '{path}'") from None
    old = getattr(owner, leaf, None)
    if not isinstance(old, nn.Parameter):
        raise ValueError(f"layer {layer} has no parameter '{name}'")
    if tensor.shape != old.shape:
        raise ValueError(
            f"layer {layer}: '{name}' is {tuple(tensor.shape)}, not {tuple(old.shape)}"
        )
    finite(tensor, f"'{name}' of the block that replaces layer {layer}, in {tensor.dtype},")
    owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))


def joined(below: Blocks, above: Blocks) -> Blocks:
    """Parameters of both, those of ``above`` where both have them."""
    made: Blocks = {}
    for stage in STAGES:
        old, new = below.get(stage, {}), above.get(stage, {})
        made[stage] = {i: {**old.get(i, {}), **new.get(i, {})} for i in sorted({*old, *new})}
    return made
