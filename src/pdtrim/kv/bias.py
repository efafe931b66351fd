"""What the projections' biases add to every key and value, kept apart from what is coded.

Some models add a bias to keys (Qwen2 and Qwen2.5: of norm 390 in early layers), which RoPE then
turns with the position. It is the same for every prompt, both stages have it, and it is far larger
than what the prompt adds: coded along with that it takes the bits, and rotated along the head width
it spoils every channel. So a codec that rounds sees keys and values without it, and decode adds it
again. Measured on Qwen2.5-Coder-0.5B, KL in nats: int3:rotate=true 2.72 to 0.006, int2:rotate=true
1.37 to 0.16, int4:rotate=true 0.009 to 0.001 (docs/log.md).

Shapes: B rows, G KV heads, g of a group, M kept tokens, T positions, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pdtrim.kv.groups import HeadGroup

Table = tuple[Tensor, Tensor]
"""cos and sin of positions 0 .. T - 1, each ``[T, D]``."""


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of channels (i, i + D/2) by its angle (RoFormer, 2104.09864)."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


@dataclass(frozen=True, kw_only=True)
class KVBias:
    """The biases of a layer's KV heads, before the rotation."""

    k_GD: Tensor
    v_GD: Tensor

    def taken_from(self, group: HeadGroup, rope: Table) -> HeadGroup:
        """A group without the biases."""
        return self._moved(group, rope, -1.0)

    def added_to(self, group: HeadGroup, rope: Table) -> HeadGroup:
        """A group with the biases again."""
        return self._moved(group, rope, 1.0)

    def _moved(self, group: HeadGroup, rope: Table, sign: float) -> HeadGroup:
        """In fp32, rounded once to the group's dtype."""
        heads = list(group.heads)
        cos_BgMD, sin_BgMD = (part.float()[group.positions_BgM] for part in rope)
        k_gMD = self.k_GD[heads].float()[:, None]
        k_BgMD = turn(k_gMD.expand_as(cos_BgMD), cos_BgMD, sin_BgMD)
        v_gMD = self.v_GD[heads].float()[:, None]
        return replace(
            group,
            k_BgMD=(group.k_BgMD.float() + sign * k_BgMD).to(group.k_BgMD.dtype),
            v_BgMD=(group.v_BgMD.float() + sign * v_gMD).to(group.v_BgMD.dtype),
        )
