"""The width methods with small settings, and naive readings of what their plans cut."""

import copy

import pytest
import torch

from pdtrim.methods import Target
from pdtrim.methods.baselines import FLAP, LLMPruner, LLMPrunerVector, WandaSP
from pdtrim.models.model import Model

L, ROWS = 4, 6
ALL = {
    "llm-pruner": LLMPruner(protect_first=1, protect_last=1),
    "llm-pruner-vector": LLMPrunerVector(protect_first=1, protect_last=1),
    "element2": LLMPruner(protect_first=1, protect_last=1, criterion="element2"),
    "flap": FLAP(),
    "flap-bare": FLAP(bias=False),
    "wanda-sp": WandaSP(),
}
PREFILL_LAST = ("input_layernorm.", "self_attn.k_", "self_attn.v_")  # and nothing else
UNIFORM = {name: method for name, method in ALL.items() if "flap" not in name}
each = pytest.mark.parametrize("method", ALL.values(), ids=ALL)
each_uniform = pytest.mark.parametrize("method", UNIFORM.values(), ids=UNIFORM)


def plan_of(method, model, calibration, folder, share=0.2, prefill=None, **more):
    """A plan in ``folder``, made in mode ``subset`` if prefill's share is given."""
    target = Target(
        **{
            "metric": "parameters",
            "mode": "unified" if prefill is None else "subset",
            "prefill_share": share if prefill is None else prefill,
            "decode_share": share,
            **more,
        }
    )
    return method.plan(model, calibration, target).save(folder / "plan.json").plan


def lost(model, plan, stage, layer):
    """Groups and neurons that a stage loses of a layer."""
    width = plan.width(stage, layer)
    if width is None:
        return set(), set()
    groups, neurons = range(model.num_kv_heads), range(model.config.intermediate_size)
    return set(groups) - set(width.groups), set(neurons) - set(width.kept_neurons)


def projections(model, layer):
    block = model.network.model.layers[layer]
    return block.self_attn.o_proj, block.mlp.down_proj


def group_channels(model, group):
    """Columns of o that belong to a KV head, by a loop over query heads."""
    heads, size = model.config.num_attention_heads, model.head_dim
    shared = heads // model.num_kv_heads
    return [
        head * size + i for head in range(heads) if head // shared == group for i in range(size)
    ]


@torch.no_grad()
def inputs_of(model, ids, layer):
    """What o and down read in an ordinary forward, each ``[tokens, F]``."""
    seen = []
    hooks = [
        part.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
        for part in projections(model, layer)
    ]
    model.network(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def cut_out(model, plan, stage, layers=range(L)):
    """The dense model with the columns of what a plan cuts set to 0."""
    made = Model(copy.deepcopy(model.network), name=model.name)
    for layer in layers:
        groups, neurons = lost(model, plan, stage, layer)
        o, down = projections(made, layer)
        for group in groups:
            o.weight[:, group_channels(model, group)] = 0
        down.weight[:, sorted(neurons)] = 0
    return made
