"""Least squares on the output projections of all kept blocks: each makes up for what came before.

    W' = argmin sum |x W'^T - d|^2 + ridge c |W' - W|^2      d = t - y

with W the projection (o or down), x what it reads in the pruned pair, y the stream that it adds to,
t the dense stream where that is read next, and c the mean over channels of sum x^2. Its solution is
W + D^T with D = (G + ridge c 1)^-1 sum x^T (d - x W^T) and G = sum x^T x. A bias b that the
projection has is not pulled: x and d are then taken from their means, and
b' = mean(d) - W' mean(x).

``linear`` corrects a cut in the one MLP before it, and what that leaves grows through the blocks
behind. Here every attention and every MLP from the first change on is fitted, in the order in which
they run, each with the earlier ones in place. It is also what narrower blocks need, in which no
block is missing but each has lost a part: the channels that stay take over what they can of those
that went. Layer-wise reconstruction of pruned weights goes back to Optimal Brain Surgeon (Hassibi
and Stork, 1992) and SparseGPT (2301.00774), whose inputs and targets are both the pruned layer's
own; here the target is the dense stream, so what earlier layers spoilt is corrected too, and each
stage is fitted on its own tokens.

Shapes: R tokens, F input channels, E hidden width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pdtrim.models.swap import Weights
from pdtrim.repair.ridge import change


def fit(
    pairs: Iterable[tuple[Tensor, Tensor]],
    weight_EF: Tensor,
    bias_E: Tensor | None = None,
    *,
    ridge: float,
) -> tuple[Tensor, Tensor | None]:
    """The weights and the bias, as the old ones are, for x ``[R, F]`` and d ``[R, E]``.

    Products are summed in float32 within a pair and in float64 over pairs.
    """
    W_EF = weight_EF.double()
    gram_FF = cross_FE = x_F = d_E = torch.zeros((), dtype=torch.float64, device=W_EF.device)
    count = 0
    for x_RF, d_RE in pairs:
        x, d = x_RF.float(), d_RE.float()
        gram_FF, cross_FE = gram_FF + (x.T @ x).double(), cross_FE + (x.T @ d).double()
        x_F, d_E, count = x_F + x.double().sum(0), d_E + d.double().sum(0), count + len(x)
    if bias_E is not None:
        gram_FF = gram_FF - torch.outer(x_F, x_F) / count
        cross_FE = cross_FE - torch.outer(x_F, d_E) / count
    W_EF = W_EF + change(gram_FF, cross_FE - gram_FF @ W_EF.T, ridge).T
    if bias_E is None:
        return W_EF.to(weight_EF.dtype), None
    return W_EF.to(weight_EF.dtype), ((d_E - W_EF @ x_F) / count).to(bias_E.dtype)


def refit(
    pairs: Iterable[tuple[Tensor, Tensor]], weights: Weights, projection: str, *, ridge: float
) -> Weights:
    """:func:`fit` of one of a block's projections, by its name in the block's parameters."""
    names = f"{projection}.weight", f"{projection}.bias"
    found = fit(pairs, weights[names[0]], weights.get(names[1]), ridge=ridge)
    return {name: part for name, part in zip(names, found, strict=True) if part is not None}
