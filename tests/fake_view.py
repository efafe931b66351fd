"""A layer's prompt made of random tensors, for selectors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

B, H, G, D, E = 3, 4, 2, 8, 16
R = H // G
SCALE = 0.5


@dataclass
class FakeView:
    k_BGND: Tensor
    v_BGND: Tensor
    h_BNE: Tensor
    q_BHND: Tensor
    unrotated_BHND: Tensor
    output_HDE: Tensor
    scale: float = SCALE

    def queries(self, last: int) -> Tensor:
        tokens = self.q_BHND.shape[2]
        assert 0 < last <= tokens
        return self.q_BHND[:, :, tokens - last :]

    def unrotated_queries(self) -> Tensor:
        return self.unrotated_BHND

    def rope(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        assert positions_T.ndim == 1 and positions_T.dtype == torch.int64
        rate = 100.0 ** (-torch.arange(D // 2) / (D // 2))
        angle_TD = (positions_T[:, None] * rate).repeat(1, 2)
        return angle_TD.cos()[None], angle_TD.sin()[None]

    def bias(self):
        return None

    def output_weight(self) -> Tensor:
        return self.output_HDE

    def row(self, row: int) -> FakeView:
        one = {
            name: getattr(self, name)[row : row + 1]
            for name in ("k_BGND", "v_BGND", "h_BNE", "q_BHND", "unrotated_BHND")
        }
        return replace(self, **one)


def fake_view(tokens: int, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> FakeView:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    return FakeView(
        k_BGND=normal(B, G, tokens, D),
        v_BGND=normal(B, G, tokens, D),
        h_BNE=normal(B, tokens, E),
        q_BHND=normal(B, H, tokens, D),
        unrotated_BHND=normal(B, H, tokens, D) + 0.3,
        output_HDE=normal(H, D, E),
    )
