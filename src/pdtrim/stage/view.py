"""A block's prompt as selectors see it. Shapes as in ``kv/view.py``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pdtrim.models.block import Block, Rope

RopeAt = Callable[[Tensor], Rope]
"""Positions ``[1, T]`` to cos and sin."""


class BlockView:
    """Keys and values are there already; queries are projected when a selector asks."""

    def __init__(
        self, block: Block, h_BNE: Tensor, k_BGND: Tensor, v_BGND: Tensor, rope_at: RopeAt
    ) -> None:
        self.block = block
        self.h_BNE = h_BNE
        self.k_BGND = k_BGND
        self.v_BGND = v_BGND
        self.scale = block.scale
        self._rope_at = rope_at

    def row(self, row: int, tokens: int) -> BlockView:
        """One row without its padding."""
        rows = slice(row, row + 1)
        return BlockView(
            self.block,
            self.h_BNE[rows, :tokens],
            self.k_BGND[rows, :, :tokens],
            self.v_BGND[rows, :, :tokens],
            self._rope_at,
        )

    def queries(self, last: int) -> Tensor:
        """See ``kv/view.py``."""
        N = self.h_BNE.shape[1]
        positions = torch.arange(N - last, N, device=self.h_BNE.device)
        return self.block.project_q(self.h_BNE[:, N - last :], self.rope(positions))

    def unrotated_queries(self) -> Tensor:
        """See ``kv/view.py``."""
        return self.block.raw_q(self.h_BNE)

    def rope(self, positions_T: Tensor) -> Rope:
        """See ``kv/view.py``."""
        return self._rope_at(positions_T[None])

    def output_weight(self) -> Tensor:
        """See ``kv/view.py``."""
        weight_EF: Tensor = self.block.attention.o_proj.weight
        return weight_EF.T.unflatten(0, (-1, self.k_BGND.shape[-1]))
