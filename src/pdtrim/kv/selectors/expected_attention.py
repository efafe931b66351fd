"""Keep the pairs that queries still to come are expected to attend to.

Queries are taken for gaussian, with the mean and covariance that they have in this prompt before
the rotation. Turned by the mean rotation of the next ``horizon`` positions they become mu and
Sigma, and ``E[exp(scale q.k)] = exp(scale k.mu + scale^2 k Sigma k / 2)``. A pair's score is the
mean over the query heads of its KV head of that quantity's share over the tokens, plus ``eps``,
times ``|v|``.

Paper: Expected Attention (arXiv 2510.00636). The first tokens are outside of it all, statistics,
shares and choice: they are outliers, and they stay. Different from the paper: scores are held as
logarithms, so that far pairs of a peaked head do not all come to 0; and ``last`` can hold more.

Shapes: B rows, N prompt tokens, G KV heads, H query heads, R = H / G, T positions, D head width,
M = N - first tokens.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from pdtrim.kv.selectors.base import Mask
from pdtrim.kv.selectors.scoring import ShareSelector
from pdtrim.kv.view import LayerView
from pdtrim.records import MOST_TOKENS


class ExpectedAttention(ShareSelector):
    """A share of the pairs, by the attention that later queries are expected to pay."""

    mask: ClassVar[Mask] = "pair"

    name: Literal["expected_attention"] = "expected_attention"
    first: int = Field(default=4, ge=0, le=MOST_TOKENS)
    last: int = Field(default=0, ge=0, le=MOST_TOKENS)
    horizon: int = Field(default=512, ge=1, le=2**16)
    eps: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    @classmethod
    def sweep(cls, share: float, tokens: int) -> str:
        """See the base class."""
        return f"expected_attention:share={share}"

    def ends(self, tokens: int) -> tuple[int, int]:
        """See the base class."""
        return self.first, self.last

    def score(self, view: LayerView) -> Tensor:
        """See the base class."""
        N = view.k_BGND.shape[2]
        rope = view.rope(torch.arange(N, N + self.horizon, device=view.k_BGND.device))
        query = query_statistics(view.unrotated_queries()[:, :, self.first :], rope)
        k_BGMD, v_BGMD = view.k_BGND[:, :, self.first :], view.v_BGND[:, :, self.first :]
        score_BGM = expected_score(k_BGMD, v_BGMD, *query, scale=view.scale, eps=self.eps)
        return F.pad(score_BGM, (self.first, 0))


def query_statistics(q_BHMD: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean ``[B, H, D]`` and covariance ``[B, H, D, D]`` of queries at the positions of ``rope``.

    Args:
        q_BHMD: queries before the rotation.
        rope: cos and sin ``[1, T, D]``, whose mean is one linear map.
    """
    q_BHMD = q_BHMD.float()
    mu_BHD = q_BHMD.mean(dim=2)
    spread_BHMD = q_BHMD - mu_BHD.unsqueeze(2)
    sigma_BHDD = spread_BHMD.mT @ spread_BHMD / q_BHMD.shape[2]
    cos_D, sin_D = (part.float().mean(dim=(0, 1)) for part in rope)
    unit_DD = torch.eye(cos_D.shape[0], device=q_BHMD.device)
    low_DF, high_DF = unit_DD.chunk(2, dim=1)
    turn_DD = unit_DD * cos_D + torch.cat((-high_DF, low_DF), dim=1) * sin_D
    return mu_BHD @ turn_DD, turn_DD.mT @ sigma_BHDD @ turn_DD


def expected_score(
    k_BGND: Tensor, v_BGND: Tensor, mu_BHD: Tensor, sigma_BHDD: Tensor, *, scale: float, eps: float
) -> Tensor:
    """Logarithm of the score, ``[B, G, N]``."""
    G = k_BGND.shape[1]
    k_BG1ND = k_BGND.float().unsqueeze(2) * scale
    mu_BGRD1 = mu_BHD.unflatten(1, (G, -1)).unsqueeze(-1)
    sigma_BGRDD = sigma_BHDD.unflatten(1, (G, -1))
    logit_BGRN = (k_BG1ND @ mu_BGRD1).squeeze(-1)
    logit_BGRN = logit_BGRN + ((k_BG1ND @ sigma_BGRDD) * k_BG1ND).sum(dim=-1) / 2
    share_BGN = logit_BGRN.log_softmax(dim=-1).logsumexp(dim=2) - math.log(logit_BGRN.shape[2])
    floor = torch.tensor(eps, device=k_BGND.device).log()
    return torch.logaddexp(share_BGN, floor) + v_BGND.float().norm(dim=-1).log()
