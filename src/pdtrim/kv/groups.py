"""Kept pairs of a layer, its heads in groups of equal counts.

Shapes: B rows, g heads of a group, M kept tokens of the fullest row, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class HeadGroup:
    """KV heads of a layer that keep equally many tokens in every row.

    Attributes:
        heads: their numbers among those of the layer that travel.
        k_BgMD, v_BgMD: kept pairs in token order.
        positions_BgM: their absolute positions.
        padded_BM: True behind a row's last kept token; None if no row is shorter.
    """

    heads: tuple[int, ...]
    k_BgMD: Tensor
    v_BgMD: Tensor
    positions_BgM: Tensor
    padded_BM: Tensor | None = None

    def to(self, device: torch.device) -> HeadGroup:
        """The group on a device."""
        return HeadGroup(
            heads=self.heads,
            k_BgMD=self.k_BgMD.to(device),
            v_BgMD=self.v_BgMD.to(device),
            positions_BgM=self.positions_BgM.to(device),
            padded_BM=None if self.padded_BM is None else self.padded_BM.to(device),
        )
