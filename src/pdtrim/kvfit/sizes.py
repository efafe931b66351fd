"""Bytes of the KV cache that a rule sends, as served: in bf16, whatever dtype measures KL."""

from __future__ import annotations

import torch

from pdtrim.kv.codecs import Raw
from pdtrim.kv.frame import LENGTH
from pdtrim.kv.policy import HandoverPolicy, select
from pdtrim.models.model import Model
from pdtrim.plan import LayerKV
from pdtrim.stage.view import BlockView

WIRE = torch.bfloat16


@torch.inference_mode()
def rule_bytes(view: BlockView, rule: LayerKV) -> float:
    """Mean bytes a prompt that a rule sends of a layer, its mask included."""
    rows, G, N, D = view.k_BGND.shape
    policy = HandoverPolicy(rules=(rule,))
    total = 0
    for row in range(rows):
        total += rule.selector.mask_rows(G) * -(-N // 8)
        for group in select(policy, 0, view.row(row, N)).groups:
            k, v = (x[0].to(WIRE) for x in (group.k_BgMD, group.v_BgMD))
            if rule.codec.variable:
                total += rule.codec.encode(k, v).numel() + LENGTH.size
            else:
                total += rule.codec.nbytes(len(group.heads), k.shape[1], D, WIRE)
    return total / rows


def full_bytes(model: Model, tokens: int) -> float:
    """Bytes of a prompt's whole KV cache."""
    return model.num_layers * Raw().nbytes(model.num_kv_heads, tokens, model.head_dim, WIRE)
