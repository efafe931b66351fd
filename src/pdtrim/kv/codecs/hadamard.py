"""The orthonormal fast Walsh-Hadamard transform: spread an outlier channel over all channels.

``H_2 = [[1, 1], [1, -1]] / sqrt(2)`` and ``H_2D = H_2 (x) H_D``: D log2 D additions and one
multiplication an element. H is symmetric and orthonormal, so it is its own inverse.

Papers: QuaRot (arXiv 2404.00456) rotates the KV cache by it before quantising; TurboQuant
(2504.19874) shows that a rotated vector's coordinates are nearly alike, so that one grid serves
them all. Different from both: no random signs, because the two sides would have to share them.

Shapes: D the last dimension, a power of two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdtrim.errors import PlanError


def hadamard(x: Tensor) -> Tensor:
    """``x H`` along the last dimension, in fp32.

    Raises:
        PlanError: the last dimension is not a power of two.
    """
    D = x.shape[-1]
    if D < 1 or D & (D - 1):
        raise PlanError(f"rotate needs a head width that is a power of two, not {D}")
    y, half = x.to(torch.float32), 1
    while half < D:
        # plain additions in a fixed order: the result is the same to the bit on every device
        left, right = y.reshape(*x.shape[:-1], D // (2 * half), 2, half).unbind(-2)
        y, half = torch.stack((left + right, left - right), dim=-2).view(x.shape), 2 * half
    return y * D**-0.5
