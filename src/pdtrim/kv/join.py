"""Put the handed-over pairs of several requests side by side, as one batch.

Shapes: B requests, G KV heads, g heads of a group, M kept tokens of a group's fullest row, D head
width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pdtrim.kv.frame import SentLayer
from pdtrim.kv.groups import HeadGroup
from pdtrim.kv.policy import padding, partition


def join(sent: Sequence[SentLayer]) -> list[HeadGroup]:
    """Groups of B rows, padded on the right to the fullest row of each group."""
    if len(sent) == 1:
        return sent[0].groups
    counts_BG = torch.stack([layer.keep_GN.sum(-1) for layer in sent])
    return [_group(sent, heads, counts_BG) for heads in partition(counts_BG)]


def _group(sent: Sequence[SentLayer], heads: tuple[int, ...], counts_BG: torch.Tensor) -> HeadGroup:
    counts_B = counts_BG[:, heads[0]]
    M, B, g = int(counts_B.max()), len(sent), len(heads)
    like = sent[0].groups[0]
    k, v = (like.k_BgMD.new_zeros(B, g, M, like.k_BgMD.shape[-1]) for _ in "kv")
    positions = like.positions_BgM.new_zeros(B, g, M)
    for row, layer in enumerate(sent):
        for group in layer.groups:
            for i, head in enumerate(group.heads):
                if head in heads:
                    at = (row, heads.index(head), slice(0, group.k_BgMD.shape[2]))
                    k[at], v[at] = group.k_BgMD[0, i], group.v_BgMD[0, i]
                    positions[at] = group.positions_BgM[0, i]
    return HeadGroup(
        heads=heads,
        k_BgMD=k,
        v_BgMD=v,
        positions_BgM=positions,
        padded_BM=padding(counts_B.to(k.device), M),
    )
