"""Choose the next token from logits.

Shapes: B batch, V vocabulary, K tokens sorted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdtrim.finite import finite
from pdtrim.stage.sampling import Sampling

LIKELY = 1024
"""Tokens sorted first: a whole vocabulary takes longer to sort than a small model to run."""
COLD = 1e-30
"""Temperatures below are greedy: in fp32 a logit over one of them is infinite."""


class Sampler:
    """Draws one token a row, with a stream of random numbers of its own for each row.

    A row's tokens so depend on its seed, ``seed + row``, and not on what shares its batch.
    """

    def __init__(self, config: Sampling, rows: int) -> None:
        self.config = config
        self.generators = [torch.Generator().manual_seed(config.seed + row) for row in range(rows)]

    def __call__(self, logits_BV: Tensor) -> Tensor:
        """Token ids ``[B]``.

        Raises:
            PdtrimError: NaN or infinity among the logits; a token that cannot be has -infinity.
        """
        most_B1 = finite(logits_BV.amax(-1, keepdim=True), "a logit of the next token")
        if self.config.temperature < COLD:
            return logits_BV.argmax(-1)
        # none is above 0, so that none becomes infinity however cold it is
        cooled_BV = (logits_BV.float() - most_B1.float()) / self.config.temperature
        p_BV = nucleus(cooled_BV.softmax(-1), self.config.top_p)
        u_B = torch.cat([torch.rand(1, generator=generator) for generator in self.generators])
        return inverse_cdf(p_BV, u_B.to(p_BV.device))


def inverse_cdf(p_BV: Tensor, u_B: Tensor) -> Tensor:
    """The token at which the cumulative probability passes ``u``, in [0, 1), of the total."""
    cdf_BV = p_BV.double().cumsum(-1)
    at_B = torch.searchsorted(cdf_BV, u_B.double()[:, None] * cdf_BV[:, -1:], right=True)
    return at_B[:, 0].clamp_max(p_BV.shape[-1] - 1)


def nucleus(p_BV: Tensor, top_p: float) -> Tensor:
    """Zero all but the smallest set of most likely tokens whose mass reaches ``top_p``."""
    if top_p >= 1.0:
        return p_BV
    kept_BV = _nucleus_of_top(p_BV, top_p, min(LIKELY, p_BV.shape[-1]))
    wide_B = kept_BV.sum(-1) < top_p  # rare: a nucleus of more tokens than that
    if bool(wide_B.any()):
        kept_BV[wide_B] = _nucleus_of_top(p_BV[wide_B], top_p, p_BV.shape[-1])
    return kept_BV


def _nucleus_of_top(p_BV: Tensor, top_p: float, count: int) -> Tensor:
    sorted_BK, order_BK = p_BV.topk(count, dim=-1)
    outside = sorted_BK.cumsum(-1) - sorted_BK >= top_p
    return torch.zeros_like(p_BV).scatter(-1, order_BK, sorted_BK.masked_fill(outside, 0.0))
