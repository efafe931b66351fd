"""Two ways to hold handed-over pairs in decode's memory, with equal logits.

*compact* keeps what travelled, a length of its own for each group of heads: the memory is really
saved. *masked* expands each head to all N slots and hides the dropped ones: the reference, and what
an engine does that cannot hold lengths of their own.

Shapes: B rows, N prompt tokens handed over, g heads of a group, M kept tokens, D head width.
"""

from __future__ import annotations

from typing import Literal

import torch

from pdtrim.kv.groups import HeadGroup

CacheLayout = Literal["compact", "masked"]


def masked(group: HeadGroup, tokens: int) -> list[HeadGroup]:
    """The group in the masked layout, one group a head as heads may differ in what is hidden."""
    B, _, M, D = group.k_BgMD.shape
    if tokens == M and group.padded_BM is None:
        return [group]
    device = group.k_BgMD.device
    out = []
    for i, head in enumerate(group.heads):
        positions_BM = group.positions_BgM[:, i]
        hidden_BN = torch.ones(B, tokens, dtype=torch.bool, device=device)
        k, v = (group.k_BgMD.new_zeros(B, 1, tokens, D) for _ in "kv")
        for row in range(B):
            at = positions_BM[row]
            if group.padded_BM is not None:
                at = at[~group.padded_BM[row]]
            hidden_BN[row, at] = False
            k[row, 0, at] = group.k_BgMD[row, i, : len(at)]
            v[row, 0, at] = group.v_BgMD[row, i, : len(at)]
        every_BN = torch.arange(tokens, device=device).expand(B, 1, tokens)
        out.append(
            HeadGroup(
                heads=(head,), k_BgMD=k, v_BgMD=v, positions_BgM=every_BN, padded_BM=hidden_BN
            )
        )
    return out
