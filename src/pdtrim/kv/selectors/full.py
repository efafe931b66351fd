"""Keep every token. The dense baseline, and the rule of layers that a policy does not select."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pdtrim.kv.selectors.base import StaticSelector


class Full(StaticSelector):
    """Everything travels."""

    name: Literal["full"] = "full"

    def static_keep(self, heads: int, tokens: int, *, block_size: int = 1) -> Tensor:
        """All True."""
        return torch.ones(heads, tokens, dtype=torch.bool)
