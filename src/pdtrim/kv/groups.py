"""Kept pairs of a layer, its heads in groups of equal counts.

Shapes: B rows, g heads of a group, M kept tokens of the fullest row, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

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
