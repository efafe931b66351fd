"""Decode's KV cache: the prompt's pairs that travelled, then the tokens decode adds.

Each layer, and in a layer each group of heads, has a length of its own. Keys keep the positions
they were rotated for. Prompts of different lengths share a batch by padding on the right of the
prompt part and hiding the padding.

Shapes: B rows, G KV heads, g heads of a group, M kept prompt tokens (padded), T new tokens, S = M +
all new, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pdtrim.kv.groups import HeadGroup


class GroupCache:
    """Keys and values of some heads, grown in place up to ``capacity`` new tokens."""

    def __init__(self, group: HeadGroup, capacity: int) -> None:
        B, g, M, D = group.k_BgMD.shape
        self.heads = group.heads
        self.positions_BgM = group.positions_BgM
        self.padded_BM = group.padded_BM
        self._k = group.k_BgMD.new_empty(B, g, M + capacity, D)
        self._v = torch.empty_like(self._k)
        self._k[:, :, :M], self._v[:, :, :M] = group.k_BgMD, group.v_BgMD
        self._length = M

    def extend(self, k_BgTD: Tensor, v_BgTD: Tensor) -> tuple[Tensor, Tensor]:
        """Append new tokens; returns all keys and values so far, ``[B, g, S, D]``."""
        stop = self._length + k_BgTD.shape[2]
        assert stop <= self._k.shape[2], "cache capacity exceeded"
        self._k[:, :, self._length : stop] = k_BgTD
        self._v[:, :, self._length : stop] = v_BgTD
        self._length = stop
        return self._k[:, :, :stop], self._v[:, :, :stop]

    def allowed(self, positions_BT: Tensor, window: int | None) -> Tensor | None:
        """Which keys each new query may see beyond causality; None when all. Call after extend.

        Args:
            positions_BT: of the queries appended last; decode appends consecutive positions.
            window: of the layer's attention, None for unlimited; all heads of the group must then
                keep the same tokens.
        """
        if self.padded_BM is None and window is None:
            return None
        batch, queries = positions_BT.shape
        prompt = self.positions_BgM[:, 0].expand(batch, -1)
        new = self._length - prompt.shape[1]
        added = positions_BT[:, -1:] + torch.arange(1 - new, 1, device=prompt.device)
        keys = torch.cat((prompt, added), dim=1)
        allowed = keys.new_ones(batch, queries, keys.shape[1], dtype=torch.bool)
        if self.padded_BM is not None:
            allowed[:, :, : prompt.shape[1]] &= ~self.padded_BM[:, None]
        if window is not None:
            allowed &= positions_BT[:, :, None] - keys[:, None] < window
        return allowed

    @property
    def nbytes(self) -> int:
        """Bytes it holds in memory."""
        return 2 * self._k.numel() * self._k.element_size()


class LayerCache:
    """One layer's cache: a group of heads for each length.

    Args:
        window: of the layer's attention. With one, heads that keep different tokens are held
            apart, because the window hides keys by position.
        capacity: new tokens it must hold.
    """

    def __init__(
        self, groups: Sequence[HeadGroup], *, capacity: int, window: int | None = None
    ) -> None:
        if window is not None:
            groups = [one for group in groups for one in _by_positions(group)]
        self.groups = [GroupCache(group, capacity) for group in groups]

    @property
    def nbytes(self) -> int:
        """Bytes the layer holds in memory."""
        return sum(group.nbytes for group in self.groups)


def _by_positions(group: HeadGroup) -> list[HeadGroup]:
    if bool((group.positions_BgM == group.positions_BgM[:, :1]).all()):
        return [group]
    return [
        replace(
            group,
            heads=(head,),
            k_BgMD=group.k_BgMD[:, i : i + 1],
            v_BgMD=group.v_BgMD[:, i : i + 1],
            positions_BgM=group.positions_BgM[:, i : i + 1],
        )
        for i, head in enumerate(group.heads)
    ]
