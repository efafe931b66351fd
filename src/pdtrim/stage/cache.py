"""Decode's KV cache: the prompt's tokens that travelled, then the tokens decode adds.

Each layer has its own length. Keys keep the positions they were rotated for. Prompts of different
lengths share a batch by padding on the right of the prompt part and hiding the padding.

Shapes: B batch, G KV heads, M kept prompt tokens (padded), T new tokens, S = M + all new, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(kw_only=True)
class LayerCache:
    """One layer's keys and values, grown in place up to ``capacity`` new tokens.

    Args:
        k_BGMD, v_BGMD: the prompt's.
        positions_BM: absolute position of each prompt token; first axis may be 1.
        capacity: new tokens it must hold.
        padded_BM: True where a prompt slot is padding; None if nothing is padded.
    """

    k_BGMD: Tensor
    v_BGMD: Tensor
    positions_BM: Tensor
    capacity: int
    padded_BM: Tensor | None = None
    _k: Tensor = field(init=False, repr=False)
    _v: Tensor = field(init=False, repr=False)
    _length: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        B, G, M, D = self.k_BGMD.shape
        self._k = self.k_BGMD.new_empty(B, G, M + self.capacity, D)
        self._v = torch.empty_like(self._k)
        self._k[:, :, :M], self._v[:, :, :M] = self.k_BGMD, self.v_BGMD
        self.k_BGMD, self.v_BGMD = self._k[:, :, :M], self._v[:, :, :M]  # free the originals
        self._length = M

    def extend(self, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        """Append new tokens; returns all keys and values so far, ``[B, G, S, D]``."""
        stop = self._length + k_BGTD.shape[2]
        assert stop <= self._k.shape[2], "cache capacity exceeded"
        self._k[:, :, self._length : stop] = k_BGTD
        self._v[:, :, self._length : stop] = v_BGTD
        self._length = stop
        return self._k[:, :, :stop], self._v[:, :, :stop]

    def allowed(self, positions_BT: Tensor, window: int | None) -> Tensor | None:
        """Which keys each new query may see beyond causality; None when all. Call after extend.

        Args:
            positions_BT: of the queries appended last; decode appends consecutive positions.
            window: of the layer's attention, None for unlimited.
        """
        if self.padded_BM is None and window is None:
            return None
        batch, queries = positions_BT.shape
        prompt = self.positions_BM.expand(batch, -1)
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
        """Bytes this layer holds in memory."""
        return 2 * self._k.numel() * self._k.element_size()
