"""One scalar a cut: the stream behind it gets the dense stream's mean norm.

    g = mean |t| / mean |s|

with s the stream that reaches the layer behind the cut and t the dense model's stream there. This
is the magnitude compensation of Prune&Comp (arXiv 2507.18212), which scales the stream itself, by
way of the weights that write it. Those include the embedding, which a tied head shares. But every
reader of the stream norms it first, so only the ratio of earlier to later writes counts: here the
writes of the kept blocks behind the cut are divided by g instead. That is the same function, exact
but for the epsilon inside RMSNorm, and touches blocks only. Behind the last block there is nothing
to divide, so a cut at the model's end stays as it is.

The fit sees the repaired stream, in which the earlier gains are already divided out. So g is the
gain since the embedding, not since the last cut.

Shapes: R tokens, E hidden width.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from pdtrim.models.swap import Weights


def fit(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Gain g of the streams s over the targets t, each ``[R, E]``; 1 where s is all zero."""
    found, wanted = 0.0, 0.0
    for s_RE, t_RE in pairs:
        found += float(s_RE.double().norm(dim=-1).sum())
        wanted += float(t_RE.double().norm(dim=-1).sum())
    return wanted / found if found > 0 and wanted > 0 else 1.0


def fold(weights: Weights, gain: float) -> Weights:
    """What of a block's parameters writes to the stream, divided by the gain."""
    return {name: (part.double() / gain).to(part.dtype) for name, part in weights.items()}
