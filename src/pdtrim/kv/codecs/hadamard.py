"""The orthonormal fast Walsh-Hadamard transform: spread an outlier channel over all channels.

``H_2 = [[1, 1], [1, -1]] / sqrt(2)`` and ``H_2D = H_2 (x) H_D``: D log2 D additions and one
multiplication an element. H is symmetric and orthonormal, so it is its own inverse.

Papers: QuaRot (arXiv 2404.00456) rotates the KV cache by it before quantising; TurboQuant
(2504.19874) shows that a rotated vector's coordinates are nearly alike, so that one grid serves
them all. Different from both: no random signs, because the two sides would have to share them.

Shapes: D the last dimension, a power of two.
"""

from __future__ import annotations

from itertools import cycle

import torch
from torch import Tensor

from pdtrim.errors import PlanError


def rotatable(width: int) -> bool:
    """Whether heads of a width can be rotated."""
    return width > 0 and width & (width - 1) == 0


def check_width(width: int) -> None:
    """Raise PlanError unless heads of a width can be rotated."""
    if not rotatable(width):
        raise PlanError(f"rotate needs a head width that is a power of two, not {width}")


def hadamard(x: Tensor) -> Tensor:
    """``x H`` along the last dimension, in fp32; a view of its transpose, which is contiguous.

    Raises:
        PlanError: the last dimension is not a power of two.
    """
    D = x.shape[-1]
    check_width(D)
    # channels before tokens, so that even the first stage adds long contiguous rows
    y = torch.atleast_2d(x).transpose(-1, -2).contiguous().to(torch.float32)
    # each stage writes what the one before it did not: y may be the caller's own memory
    spares, half = cycle((torch.empty_like(y), torch.empty_like(y))), 1
    while half < D:
        pairs, spare = (D // (2 * half), 2, half), next(spares)
        left, right = y.unflatten(-2, pairs).unbind(-3)
        above, below = spare.unflatten(-2, pairs).unbind(-3)
        # plain additions in a fixed order: the result is the same to the bit on every device
        torch.add(left, right, out=above)
        torch.sub(left, right, out=below)
        y, half = spare, 2 * half
    return torch.mul(y, D**-0.5, out=next(spares)).transpose(-1, -2).view(x.shape)
