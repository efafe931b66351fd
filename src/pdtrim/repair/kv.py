"""Keys and values of a block that prefill skips, from the stream that stood still before it.

    W' = argmin sum w |h W'^T - g W^T|^2 + ridge c |W' - W|^2

for the key and the value projection W, with h the block's normed input in the pruned prefill, g
that of the dense model, w a token's weight and c the mean over channels of sum w h^2. Its solution
is W + D^T with D = (G + ridge c 1)^-1 sum w h^T (g - h) W^T and G = sum w h^T h, summed in float64.
The first token is one of hundreds in a fit, and the one that most attention falls back on (a sink:
StreamingLLM, 2309.17453). Its weight is w = ``SINK``, every other token's is 1.

What a stream does not tell, a fit leaves out: fitted keys differ less from one another than the
dense model's, while their mean is met. So a query that should find one far token falls back on the
sink, which web text hardly notices and recall does. With keys that go only a part of the way from W
to W' (:func:`part_way`) more is found (measured in docs/log.md).

All that prefill makes are keys and values, and a skipped block's K and V are projected from a
stream that lacks the blocks before it. Its projections serve nothing else, so they can be fitted
without touching any stream: one fit a layer, all from one pass. SwiftKV (arXiv 2410.03960) trains
the later layers' projections by distillation to read an earlier layer's stream; POP (2602.03295)
leaves them as they are. A norm of the heads' keys (Qwen3) and the rotation come behind the
projection, so the fit is of what enters them; biases stay.

Shapes: B sequences, N tokens of one from its first on, R = B N, E hidden width, F width of all KV
heads.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pdtrim.models.block import KEYS_AND_VALUES, Block
from pdtrim.models.swap import Weights
from pdtrim.repair.ridge import change

SINK = 10.0
"""Weight of a sequence's first token."""


def fitted(
    block: Block, own: Weights, pairs: Iterable[tuple[Tensor, Tensor]], *, ridge: float
) -> Weights:
    """The parameters of a block's projections that make keys and values, fitted; biases stay.

    Args:
        own: these parameters as they are; not changed.
        pairs: as :func:`fit` takes them.
    """
    made = {name: part.clone() for name, part in own.items() if part.dim() > 1}
    # where a family fuses queries with keys and values, a selector may still read them
    rows: Weights = {
        part: made[f"{block.making(part).name}.weight"][block.span(part)]
        for part in KEYS_AND_VALUES
    }
    for part, new in fit(pairs, rows, ridge=ridge).items():
        rows[part].copy_(new)
    return made


def fit(pairs: Iterable[tuple[Tensor, Tensor]], projections: Weights, *, ridge: float) -> Weights:
    """The projections ``[F, E]`` for normed inputs h of the pruned and g of the dense model.

    Args:
        pairs: h and g, each ``[B, N, E]``.
        projections: as the dense model has them.
    """
    gram_EE = cross_EE = torch.zeros((), dtype=torch.float64)
    for h_BNE, g_BNE in pairs:
        h_RE, g_RE = h_BNE.flatten(0, 1).double(), g_BNE.flatten(0, 1).double()
        wh_BNE = h_RE.view(h_BNE.shape).clone()
        wh_BNE[:, 0] *= SINK
        wh_ER = wh_BNE.flatten(0, 1).T
        gram_EE = gram_EE.to(h_RE.device) + wh_ER @ h_RE
        cross_EE = cross_EE.to(h_RE.device) + wh_ER @ (g_RE - h_RE)
    eye_EE = torch.eye(len(gram_EE), dtype=torch.float64, device=gram_EE.device)
    wanted_EE = eye_EE + change(gram_EE, cross_EE, ridge).T
    return {name: (w.double() @ wanted_EE).to(w.dtype) for name, w in projections.items()}


def part_way(block: Block, own: Weights, made: Weights, share: float) -> Weights:
    """What was fitted, with keys that go a share of the way from a block's own to it.

    Args:
        own, made: as :func:`fitted` takes and gives them; not changed.
    """
    name, rows = f"{block.making('keys').name}.weight", block.span("keys")
    part = made[name].clone()
    part[rows] = torch.lerp(own[name][rows], part[rows], share)
    return {**made, name: part}
