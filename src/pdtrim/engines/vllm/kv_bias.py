"""The biases of keys and values that codecs do not see, for pages as vLLM has them.

They are read from the stage's own checkpoint: both stages hold the dense model's, of the KV heads
that they keep; those that decode keeps are used, of them each rank its own. RoPE's angles are
transformers' for the checkpoint's config, as the simulator uses them.

Shapes: G KV heads, M kept tokens, D head width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pdtrim.engines.ranges import Part
from pdtrim.engines.vllm.stage import Served
from pdtrim.kv.bias import KVBias, Table
from pdtrim.kv.groups import HeadGroup
from pdtrim.models.checkpoint import read_kv_bias, stage_rope


class StageBias:
    """The biases of the layers whose codecs round; nothing for models without.

    Args:
        rank: of the ``ranks`` that share the KV heads.
    """

    def __init__(self, vllm_config: Any, served: Served, *, rank: int, ranks: int) -> None:
        model = vllm_config.model_config
        rounded = [i for i in served.plan.sent_layers if not served.plan.kv[i].codec.exact]
        folder = Path(model.model)
        self.block_size: int = vllm_config.cache_config.block_size
        self.by_layer = read_kv_bias(folder, served.stage, rounded)
        for layer, bias in self.by_layer.items():
            places = range(len(bias.k_GD))
            sent = served.plan.sent_places(layer) if served.stage == "prefill" else places
            share = len(sent) // ranks
            own = [*sent[rank * share : (rank + 1) * share]]
            self.by_layer[layer] = KVBias(k_GD=bias.k_GD[own], v_GD=bias.v_GD[own])
        self._rope = stage_rope(folder, served.stage, model.dtype) if self.by_layer else None

    def taken_from(self, part: Part, tokens: int, kv: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Keys and values ``[G, M, D]`` without the biases.

        Args:
            tokens: of the prompt that are handed over, with those of the hole.
        """
        return self._moved(part, tokens, kv, KVBias.taken_from)

    def added_to(self, part: Part, tokens: int, kv: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Keys and values ``[G, M, D]`` with the biases again."""
        return self._moved(part, tokens, kv, KVBias.added_to)

    def _moved(
        self, part: Part, tokens: int, kv: tuple[Tensor, Tensor], move: Any
    ) -> tuple[Tensor, ...]:
        bias = self.by_layer.get(part.layer)
        if bias is None:
            return kv
        k_GMD, v_GMD = kv
        device = k_GMD.device
        start, stop = (page * self.block_size for page in part.hole)
        at = torch.arange(tokens, device=device)
        at_M = torch.cat((at[:start], at[stop:]))  # a short prompt ends before the hole's place
        heads = len(k_GMD)
        group = HeadGroup(
            heads=tuple(range(heads)),
            k_BgMD=k_GMD[None],
            v_BgMD=v_GMD[None],
            positions_BgM=at_M.expand(1, heads, -1),
        )
        if bias.k_GD.device != device:  # once: a copy from the host waits for the GPU
            bias = KVBias(k_GD=bias.k_GD.to(device), v_GD=bias.v_GD.to(device))
            self.by_layer[part.layer] = bias
        moved = move(bias, group, self._table(tokens, device))
        return moved.k_BgMD[0], moved.v_BgMD[0]

    def _table(self, tokens: int, device: torch.device) -> Table:
        assert self._rope is not None
        cos, sin = self._rope(torch.arange(tokens, device=device)[None])
        return cos[0], sin[0]
