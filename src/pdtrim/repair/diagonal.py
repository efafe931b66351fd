"""One scale a channel on the output of the MLP before a cut: least squares with a diagonal matrix.

    s = (sum m d + ridge c) / (sum m^2 + ridge c)      d = t - y

a channel, with m the MLP's output, y the stream without it, t the dense stream behind the cut, and
c the mean over channels of sum m^2. The ridge pulls toward 1.

LinearPatch (NeurIPS 2025) scales channels too, but those of the whole stream, after a Hadamard
rotation, by the ratio of mean magnitudes. A scale for each channel of the whole stream cannot go
into one stage's blocks: the norms would see it. Here only the last write before the cut is scaled,
in the stream's own basis, and the scale is the best one in squares. It has E numbers to fit where
``linear`` has E^2, so it needs less text.

Shapes: R tokens, E hidden width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def fit(pairs: Iterable[tuple[Tensor, Tensor]], *, ridge: float) -> Tensor:
    """The matrix diag(s) ``[E, E]`` (float64) for m and d, each ``[R, E]``."""
    square_E = cross_E = torch.zeros((), dtype=torch.float64)
    for m_RE, d_RE in pairs:
        m, d = m_RE.double(), d_RE.double()
        square_E = square_E.to(m.device) + m.square().sum(0)
        cross_E = cross_E.to(m.device) + (m * d).sum(0)
    data = 1 / (1 + ridge)  # both sides divided by 1 + ridge, so that an infinite one will do
    left_E = data * square_E + (1 - data) * square_E.mean()
    # a channel that is never written stays as it is
    change_E = torch.where(left_E > 0, data * (cross_E - square_E) / left_E, 0)
    return torch.diag(1 + change_E)
