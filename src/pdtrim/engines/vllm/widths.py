"""Narrower blocks: vLLM's projections and attentions of as many heads and neurons as a stage keeps.

vLLM allots a cache to attentions of different head counts by itself, and gives each its own
metadata. Two things are done to the weights on their way in; they change the order of sums and
nothing else. Prefill holds the KV heads that decode keeps before its others, each with its query
heads, so that what decode reads of a page is the page's beginning, in one descriptor. And an MLP's
neurons are filled up with zeros to a multiple of :data:`ALIGN`, 128 bytes of a 16-bit type: where
rows begin on such borders, GPUs multiply matrices by their fast kernels.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pdtrim.engines.vllm.compat import Attention
from pdtrim.engines.vllm.stage import Served
from pdtrim.models.block import Projection
from pdtrim.models.families import family_named
from pdtrim.plan import Width

ALIGN = 64
NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


def narrow(blocks_L: nn.ModuleList, served: Served, vllm_config: Any) -> None:
    """Make the blocks of a stage as narrow as its plan has them, before weights are loaded."""
    for slot, layer in enumerate(served.layers):
        width = served.plan.width(served.stage, layer)
        if width is not None:
            block: Any = blocks_L[slot]
            _narrow_attention(block.self_attn, width, vllm_config)
            _narrow_mlp(block.mlp, width)


def padded(neurons: int) -> int:
    """Neurons that a narrower MLP has with its zeros."""
    return -(-neurons // ALIGN) * ALIGN


def arranged(
    weights: Iterable[tuple[str, Tensor]], served: Served, queries: int
) -> Iterator[tuple[str, Tensor]]:
    """A stage's tensors as its narrower blocks take them.

    Args:
        queries: query heads of a KV head.
    """
    family = family_named(served.plan.model.family)
    projections = {projection.name: projection for projection in family.PROJECTIONS}
    for name, tensor in weights:
        found = NAME.fullmatch(name)
        projection = projections.get(found[2]) if found else None
        if found and projection and not (projection.writes and found[3] == "bias"):
            layer = served.layers[int(found[1])]
            tensor = _arranged(tensor, projection, served, layer, queries)
        yield name, tensor


def _arranged(
    tensor: Tensor, projection: Projection, served: Served, layer: int, queries: int
) -> Tensor:
    axis = 1 if projection.writes else 0
    if projection.unit == "group":
        sizes = [queries if made in ("queries", "attention") else 1 for made in projection.makes]
        return in_order(tensor, axis, sizes, heads_in_order(served, layer))
    if served.plan.width(served.stage, layer) is None:
        return tensor
    parts = tensor.movedim(axis, -1).chunk(len(projection.makes), dim=-1)
    filled = [F.pad(part, (0, padded(part.shape[-1]) - part.shape[-1])) for part in parts]
    return torch.cat(filled, dim=-1).movedim(-1, axis).contiguous()


def heads_in_order(served: Served, layer: int) -> tuple[int, ...]:
    """The KV heads that a stage keeps of a layer, as it holds them: places in its checkpoint."""
    plan = served.plan
    places = tuple(range(len(plan.kv_heads(served.stage, layer))))
    if served.stage == "decode" or layer not in plan.sent_layers:
        return places
    sent = plan.sent_places(layer)
    return (*sent, *(place for place in places if place not in sent))


def in_order(tensor: Tensor, axis: int, sizes: Sequence[int], order: Sequence[int]) -> Tensor:
    """A projection's weight or bias with its KV heads in another order.

    Args:
        axis: of the heads' channels.
        sizes: of what the projection makes, one after the other, heads for a KV head.
        order: old places of the KV heads.
    """
    if list(order) == sorted(order):
        return tensor
    unit = tensor.shape[axis] // sum(sizes)
    at = torch.tensor(order, device=tensor.device)
    parts = [
        part.unflatten(axis, (len(order), -1)).index_select(axis, at).flatten(axis, axis + 1)
        for part in tensor.split([unit * size for size in sizes], dim=axis)
    ]
    return torch.cat(parts, dim=axis)


def _narrow_attention(attention: Any, width: Width, vllm_config: Any) -> None:
    from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear

    whole = attention.attn
    groups = len(width.groups)
    heads = groups * (whole.num_heads // whole.num_kv_heads)
    attention.num_heads = attention.total_num_heads = heads
    attention.num_kv_heads = attention.total_num_kv_heads = groups
    attention.q_size, attention.kv_size = (n * attention.head_dim for n in (heads, groups))
    qkv, out = attention.qkv_proj, attention.o_proj
    attention.qkv_proj = QKVParallelLinear(
        qkv.hidden_size,
        attention.head_dim,
        total_num_heads=heads,
        total_num_kv_heads=groups,
        bias=qkv.bias is not None,
        prefix=qkv.prefix,
    )
    attention.o_proj = RowParallelLinear(
        attention.q_size,
        out.output_size,
        bias=width.biased or out.bias is not None,
        prefix=out.prefix,
    )
    del vllm_config.compilation_config.static_forward_context[whole.layer_name]
    attention.attn = Attention(
        heads,
        attention.head_dim,
        attention.scaling,
        num_kv_heads=groups,
        cache_config=vllm_config.cache_config,
        prefix=whole.layer_name,
    )


def _narrow_mlp(mlp: Any, width: Width) -> None:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear

    ahead, out = mlp.gate_up_proj, mlp.down_proj
    neurons = padded(len(width.kept_neurons))
    mlp.gate_up_proj = MergedColumnParallelLinear(
        ahead.input_size, [neurons] * 2, bias=ahead.bias is not None, prefix=ahead.prefix
    )
    mlp.down_proj = RowParallelLinear(
        neurons,
        out.output_size,
        bias=width.biased or out.bias is not None,
        prefix=out.prefix,
    )
