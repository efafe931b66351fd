"""The ridge that the fits of matrices share.

    D = (G + ridge c 1)^-1 M

with G the Gram matrix of what is read, M what is missing of the cross products, and c the mean of
G's diagonal, so that the ridge is relative to the data.

Shapes: F channels that are read, E that are written.
"""

from __future__ import annotations

import torch
from torch import Tensor


def change(gram_FF: Tensor, missing_FE: Tensor, ridge: float) -> Tensor:
    """D ``[F, E]`` in float64; 0 where all that was read is 0."""
    scale = float(gram_FF.diagonal().mean())
    if scale == 0:
        return torch.zeros_like(missing_FE)
    data = 1 / (1 + ridge)  # both sides divided by 1 + ridge, so that an infinite one will do
    eye_FF = torch.eye(len(gram_FF), dtype=torch.float64, device=gram_FF.device)
    return torch.linalg.solve(data * gram_FF + (1 - data) * scale * eye_FF, data * missing_FE)
