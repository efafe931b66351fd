"""A block's prompt as selectors see it. Shapes as in ``kv/view.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pdtrim.kv.bias import KVBias
from pdtrim.models.block import Block, Rope
from pdtrim.models.narrow import channels

RopeAt = Callable[[Tensor], Rope]
"""Positions ``[1, T]`` to cos and sin."""


class BlockView:
    """Keys and values are there already; queries are projected when a selector asks.

    Args:
        places: which of the block's KV heads ``k_BGND`` and ``v_BGND`` hold; None is all.
    """

    def __init__(
        self,
        block: Block,
        h_BNE: Tensor,
        k_BGND: Tensor,
        v_BGND: Tensor,
        rope_at: RopeAt,
        *,
        places: Sequence[int] | None = None,
    ) -> None:
        self.block = block
        self.h_BNE = h_BNE
        self.k_BGND = k_BGND
        self.v_BGND = v_BGND
        self.scale = block.scale
        self._rope_at = rope_at
        self._places = places

    def row(self, row: int, tokens: int) -> BlockView:
        """One row without its padding."""
        rows = slice(row, row + 1)
        return BlockView(
            self.block,
            self.h_BNE[rows, :tokens],
            self.k_BGND[rows, :, :tokens],
            self.v_BGND[rows, :, :tokens],
            self._rope_at,
            places=self._places,
        )

    def heads(self, places: Sequence[int]) -> BlockView:
        """See ``kv/view.py``."""
        rows = list(places)
        return BlockView(
            self.block,
            self.h_BNE,
            self.k_BGND[:, rows],
            self.v_BGND[:, rows],
            self._rope_at,
            places=rows if self._places is None else [self._places[row] for row in rows],
        )

    def queries(self, last: int) -> Tensor:
        """See ``kv/view.py``."""
        N = self.h_BNE.shape[1]
        positions = torch.arange(N - last, N, device=self.h_BNE.device)
        q_BHWD = self.block.project_q(self.h_BNE[:, N - last :], self.rope(positions))
        return self._own(q_BHWD, 1)

    def unrotated_queries(self) -> Tensor:
        """See ``kv/view.py``."""
        return self._own(self.block.raw_q(self.h_BNE), 1)

    def rope(self, positions_T: Tensor) -> Rope:
        """See ``kv/view.py``."""
        return self._rope_at(positions_T[None])

    def bias(self) -> KVBias | None:
        """See ``kv/view.py``."""
        whole = self.block.kv_bias()
        if whole is None or self._places is None:
            return whole
        rows = list(self._places)
        return KVBias(k_GD=whole.k_GD[rows], v_GD=whole.v_GD[rows])

    def output_weight(self) -> Tensor:
        """See ``kv/view.py``."""
        weight_EF: Tensor = self.block.matrix("attention").weight
        return self._own(weight_EF.T.unflatten(0, (-1, self.k_BGND.shape[-1])), 0)

    def _own(self, heads: Tensor, dim: int) -> Tensor:
        """Those of all query heads, along ``dim``, that read the KV heads of this view."""
        if self._places is None:
            return heads
        rows = channels(self._places, self.block.attention.num_key_value_groups)
        return heads.index_select(dim, torch.tensor(rows, device=heads.device))
