"""Causal attention of T queries over S keys whose last T belong to the queries themselves.

Query t sees keys 0 .. S - T + t: exactly the prompt keys that travelled, and the stage's own past.

On a CPU in bf16, torch's fused kernel reaches a fraction of the speed of plain matrix products
(54 against 900 GFLOP/s on two AVX512-BF16 cores), so there the scores are computed in query tiles
that fit the cache and stop at the diagonal. Autograd goes through them too, six times as fast as
through the fused kernel (256 queries, 511 keys). Everywhere else the fused kernel is used, in fp32
where the CPU has no instructions for bf16.

On a GPU what is to be differentiated keeps off cuDNN, whose gradient is NaN for some numbers of
keys under a mask (64 more than a multiple of 128) where all logits of a query are far below 0, as
some of Qwen2.5's are: https://github.com/pytorch/pytorch/issues/196678.

Shapes: B batch, H query heads, G KV heads, R = H / G, T queries, S keys, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pdtrim.models.emulated import emulated

TILE_SCORES = 2_000_000
"""Scores held at once by the tiled kernel: 4 MB of bf16, about a last-level cache share."""
DIFFERENTIABLE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    *,
    scale: float,
    allowed_BTS: Tensor | None = None,
) -> Tensor:
    """Softmax attention, ``[B, H, T, D]``.

    Args:
        scale: multiplies query-key products.
        allowed_BTS: bool, False where a key must not be seen (beyond causality); first axis may
            be 1. Each query must see at least one key.
    """
    queries, keys = q_BHTD.shape[2], k_BGSD.shape[2]
    if queries == 0:
        return q_BHTD
    if emulated(q_BHTD):
        wide = (tensor.float() for tensor in (q_BHTD, k_BGSD, v_BGSD))
        return attend(*wide, scale=scale, allowed_BTS=allowed_BTS).to(q_BHTD.dtype)
    if q_BHTD.device.type == "cpu" and q_BHTD.dtype == torch.bfloat16:
        return _tiled(q_BHTD * scale, k_BGSD, v_BGSD, allowed_BTS)
    causal = allowed_BTS is None and queries == keys
    mask = None
    if not causal and (queries > 1 or allowed_BTS is not None):
        mask = q_BHTD.new_ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None]
        mask = (mask if allowed_BTS is None else mask & allowed_BTS)[:, None]
    attended = _differentiable if _recorded(q_BHTD, k_BGSD, v_BGSD) else _fused
    return attended(q_BHTD, k_BGSD, v_BGSD, mask, causal, scale)


def _recorded(*tensors: Tensor) -> bool:
    """Whether a GPU's attention over these is to be differentiated."""
    needed = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return needed and tensors[0].is_cuda


def _fused(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    return F.scaled_dot_product_attention(
        q_BHTD, k_BGSD, v_BGSD, mask, is_causal=causal, scale=scale, enable_gqa=True
    )


def _differentiable(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """The same without cuDNN; under a mask the others take no groups."""
    if mask is not None:
        R = q_BHTD.shape[1] // k_BGSD.shape[1]
        k_BGSD, v_BGSD = (x.repeat_interleave(R, 1) for x in (k_BGSD, v_BGSD))
    with sdpa_kernel(DIFFERENTIABLE):
        return _fused(q_BHTD, k_BGSD, v_BGSD, mask, causal, scale)


def _tiled(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, allowed_BTS: Tensor | None) -> Tensor:
    B, H, T, D = q_BHTD.shape
    G, S = k_BGSD.shape[1:3]
    R = H // G
    tile = max(16, min(T, TILE_SCORES // (B * H * S)))
    q_BGRTD = q_BHTD.view(B, G, R, T, D)
    kt_PDS = k_BGSD.transpose(-1, -2).reshape(B * G, D, S)
    v_PSD = v_BGSD.reshape(B * G, S, D)
    out = []
    for start in range(0, T, tile):
        stop = min(T, start + tile)
        width, seen = stop - start, S - T + stop
        tile_q = q_BGRTD[:, :, :, start:stop].reshape(B * G, R * width, D)
        scores = torch.bmm(tile_q, kt_PDS[:, :, :seen]).view(B, G, R, width, seen)
        if width > 1:
            future = scores.new_full((width, width), -torch.inf).triu(1)
            scores[..., seen - width :] += future
        if allowed_BTS is not None:
            hidden = ~allowed_BTS[:, None, None, start:stop, :seen]
            scores.masked_fill_(hidden, -torch.inf)
        weights = scores.softmax(-1).view(B * G, R * width, seen)
        out.append(torch.bmm(weights, v_PSD[:, :seen]).view(B, H, width, D))
    return torch.cat(out, dim=2)
