"""What one block does to the residual stream, in prefill and in decode, under its gates.

The simulator, the prefill process and the decode process all run blocks through these two
functions; nothing else in pdtrim applies a block.

Shapes: B batch, T tokens, E hidden width, G KV heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdtrim.models.block import Block, Rope
from pdtrim.plan import AttentionGate
from pdtrim.stage.attention import attend
from pdtrim.stage.cache import LayerCache
from pdtrim.stage.view import BlockView, RopeAt


def prefill_block(
    block: Block | None,
    x_BTE: Tensor,
    rope: Rope,
    rope_at: RopeAt,
    *,
    attention: AttentionGate,
    mlp: bool,
) -> tuple[Tensor, BlockView | None]:
    """Run a block on the prompt from its start.

    Returns the new stream and the view of the block's keys and values, None if attention is
    ``off``. Attention ``kv`` computes them from the stream that reaches the block and adds nothing.

    Args:
        rope: of the prompt's positions; ``rope_at`` of any others that a selector asks for.
    """
    if block is None or (attention == "off" and not mlp):
        return x_BTE, None
    view = None
    if attention != "off":
        h_BTE = block.attention_norm(x_BTE)
        kv = block.project_kv(h_BTE, rope)
        view = BlockView(block, h_BTE, *kv, rope_at)
        if attention == "full":
            allowed = _window(x_BTE.shape[1], block.window, x_BTE.device)
            o_BHTD = attend(
                block.project_q(h_BTE, rope), *kv, scale=block.scale, allowed_BTS=allowed
            )
            x_BTE = x_BTE + block.project_output(o_BHTD)
    if mlp:
        x_BTE = x_BTE + block.mlp(x_BTE)
    return x_BTE, view


def decode_block(
    block: Block | None,
    y_BTE: Tensor,
    rope: Rope,
    positions_BT: Tensor,
    cache: LayerCache | None,
    *,
    attention: bool,
    mlp: bool,
) -> Tensor:
    """Run a block on new tokens; its attention reads and extends the layer's cache."""
    if block is None:
        return y_BTE
    if attention:
        assert cache is not None
        o_BHTD = _read_cache(block, block.attention_norm(y_BTE), rope, positions_BT, cache)
        y_BTE = y_BTE + block.project_output(o_BHTD)
    if mlp:
        y_BTE = y_BTE + block.mlp(y_BTE)
    return y_BTE


def _read_cache(
    block: Block, h_BTE: Tensor, rope: Rope, positions_BT: Tensor, cache: LayerCache
) -> Tensor:
    q_BHTD = block.project_q(h_BTE, rope)
    k_BGTD, v_BGTD = block.project_kv(h_BTE, rope)
    window = block.window
    if window is not None and int(positions_BT.max()) < window:
        window = None  # nothing is out of reach yet
    B, H, T, D = q_BHTD.shape
    G = k_BGTD.shape[1]
    q_BGRTD = q_BHTD.view(B, G, H // G, T, D)
    out = torch.empty_like(q_BGRTD)
    for group in cache.groups:
        heads = list(group.heads)
        whole = len(heads) == G  # the usual case: no copies
        k, v = group.extend(*((k_BGTD, v_BGTD) if whole else (k_BGTD[:, heads], v_BGTD[:, heads])))
        q = q_BHTD if whole else q_BGRTD[:, heads].flatten(1, 2)
        o = attend(q, k, v, scale=block.scale, allowed_BTS=group.allowed(positions_BT, window))
        if whole:
            return o
        out[:, heads] = o.view(B, len(heads), H // G, T, D)
    return out.view(B, H, T, D)


def _window(tokens: int, window: int | None, device: torch.device) -> Tensor | None:
    if window is None or tokens <= window:
        return None
    at = torch.arange(tokens, device=device)
    return (at[:, None] - at[None] < window)[None]
