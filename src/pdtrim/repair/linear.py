"""Least squares: the MLP before a cut also writes what the removed blocks would have written.

    W = argmin sum |m W - d|^2 + ridge c |W - 1|^2      d = t - y

with m the MLP's output, y the stream without it, t the dense stream behind the cut, 1 the identity
and c the mean over channels of sum m^2. Its solution is 1 + (G + ridge c 1)^-1 (H - G) with
G = sum m^T m and H = sum m^T d, summed in float64. W goes into the MLP's down projection.

This is ReplaceMe's least squares (arXiv 2505.02819). Different here: the ridge pulls toward the
identity, so a large one means no repair, where ReplaceMe's pulls toward zero; its size is relative
to the data; each stage has a fit of its own, on its own tokens; and m and y are those of the pruned
pair, with all earlier cuts and their repairs in place.

Shapes: R tokens, E hidden width, F inner width of the MLP.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pdtrim.models.swap import Weights
from pdtrim.repair.ridge import change


def fit(pairs: Iterable[tuple[Tensor, Tensor]], *, ridge: float) -> Tensor:
    """W ``[E, E]`` (float64) for MLP outputs m and what they should be, d, each ``[R, E]``."""
    gram_EE = cross_EE = torch.zeros((), dtype=torch.float64)
    for m_RE, d_RE in pairs:
        m, d = m_RE.double(), d_RE.double()
        gram_EE, cross_EE = gram_EE.to(m.device) + m.T @ m, cross_EE.to(m.device) + m.T @ d
    eye_EE = torch.eye(len(gram_EE), dtype=torch.float64, device=gram_EE.device)
    return eye_EE + change(gram_EE, cross_EE - gram_EE, ridge)


def fold(weights: Weights, w_EE: Tensor) -> Weights:
    """A block's down projection, its bias included, with W behind it."""
    return {name: (w_EE.T @ part.double()).to(part.dtype) for name, part in weights.items()}
