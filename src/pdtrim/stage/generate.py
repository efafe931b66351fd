"""Prefill a batch of prompts, and decode token by token from a handed-over cache.

The real processes and the self-written calibration text use these two loops.

Shapes: B batch, T tokens, G KV heads, D head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pdtrim.models.model import Model
from pdtrim.plan import Gates
from pdtrim.stage.cache import LayerCache
from pdtrim.stage.step import decode_block, prefill_block
from pdtrim.stage.view import BlockView

NextTokens = Callable[[Tensor], Tensor]
"""Logits ``[B, V]`` to token ids ``[B]``."""


@torch.inference_mode()
def prefill(model: Model, ids_BT: Tensor, gates: Gates) -> Iterator[tuple[int, BlockView]]:
    """Run prefill over prompts padded on the right; yields (layer, view) as each ends.

    Padding needs no mask: attention is causal, and nobody reads the padding's keys.
    """
    gates = gates.without_dead_work()
    at = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
    rope = model.rope(at)
    x = model.embed(ids_BT)
    for layer in range(gates.last_read + 1):
        x, view = prefill_block(
            model.blocks[layer],
            x,
            rope,
            model.rope,
            attention=gates.prefill_attention[layer],
            mlp=gates.prefill_mlp[layer],
        )
        if gates.decode_attention[layer]:
            assert view is not None
            yield layer, view


def run_prefill(model: Model, ids_BT: Tensor, gates: Gates) -> None:
    """Run prefill and let go of each view, for whoever times it."""
    for _ in prefill(model, ids_BT, gates):
        pass


@torch.inference_mode()
def decode_tokens(
    model: Model,
    gates: Gates,
    caches: dict[int, LayerCache],
    ids_BT: Tensor,
    positions_BT: Tensor,
) -> Tensor:
    """Run decode over T consecutive tokens a sequence; returns the last stream ``[B, T, E]``."""
    rope = model.rope(positions_BT)
    y = model.embed(ids_BT)
    for layer in range(gates.num_layers):
        y = decode_block(
            model.blocks[layer],
            y,
            rope,
            positions_BT,
            caches.get(layer),
            attention=gates.decode_attention[layer],
            mlp=gates.decode_mlp[layer],
        )
    return y


def generate(
    model: Model,
    gates: Gates,
    caches: dict[int, LayerCache],
    last_B: Tensor,
    positions_B: Tensor,
    sampler: NextTokens,
    *,
    max_new_tokens: int,
) -> Iterator[Tensor]:
    """Yield the next token ids ``[B]``, starting from each prompt's last token.

    Args:
        last_B, positions_B: that token and its absolute position, a sequence each.
    """
    ids_B = last_B
    for step in range(max_new_tokens):
        positions_BT = (positions_B + step)[:, None]
        y = decode_tokens(model, gates, caches, ids_B[:, None], positions_BT)
        with torch.inference_mode():
            ids_B = sampler(model.head(y)[:, -1].float())
        yield ids_B
