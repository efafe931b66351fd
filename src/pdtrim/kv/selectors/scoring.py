"""What selectors of a share have in common, and what several compute: attention, value norms.

Shapes: B rows, N prompt tokens, G KV heads, H query heads, R = H / G query heads a KV head, W last
queries, D head width, E hidden width. Everything is computed in fp32, whatever the cache is in.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from pdtrim.kv.selectors.base import SelectorBase, top
from pdtrim.kv.selectors.first_last import first_last
from pdtrim.kv.view import LayerView


class ShareSelector(SelectorBase):
    """A share of the pairs, by a score of their own; the first and the last tokens among them."""

    reads_queries: ClassVar[bool] = True

    share: float = Field(default=0.5, gt=0, le=1)

    @abstractmethod
    def ends(self, tokens: int) -> tuple[int, int]:
        """How many first and how many last tokens of a prompt always stay."""

    @abstractmethod
    def score(self, view: LayerView) -> Tensor:
        """``[B, G, N]``, or ``[B, 1, N]`` where all heads are alike."""

    def keep(self, view: LayerView, *, block_size: int = 1) -> Tensor:
        """See the base class."""
        B, G, N, _ = view.k_BGND.shape
        first, last = self.ends(N)
        if self.share == 1 or first + last >= N:
            return torch.ones(B, G, N, dtype=torch.bool, device=view.k_BGND.device)
        keep = keep_share(self.score(view), self.share, first=first, last=last)
        return keep.expand(B, G, N)


def keep_share(score_BGN: Tensor, share: float, *, first: int, last: int) -> Tensor:
    """The best pairs of each head, the first and last tokens among them.

    ``count = max(first + last, ceil(share N))``, at most N, the same for every head.
    """
    tokens = score_BGN.shape[-1]
    # 0.07 * 100 is a little above 7 in floating point and must not round to 8
    count = max(first + last, math.ceil(share * tokens - 1e-9))
    always_N = first_last(tokens, first=first, last=last).to(score_BGN.device)
    return top(score_BGN, count, always=always_N)


def window_attention(q_BHWD: Tensor, k_BGND: Tensor, scale: float) -> Tensor:
    """Attention shares ``[B, G, R, W, N]`` of the last W queries, each blind to what follows it."""
    G, N = k_BGND.shape[1:3]
    W = q_BHWD.shape[2]
    q_BGRWD = q_BHWD.float().unflatten(1, (G, -1))
    logit_BGRWN = (q_BGRWD * scale) @ k_BGND.float().mT.unsqueeze(2)
    seen_WN = torch.ones(W, N, dtype=torch.bool, device=k_BGND.device).tril(N - W)
    return logit_BGRWN.masked_fill(~seen_WN, -torch.inf).softmax(dim=-1)


def value_norm(v_BGND: Tensor, output_HDE: Tensor) -> Tensor:
    """Euclidean length ``[B, G, R, N]`` of what each value adds to the stream, by query head.

    ``|v W|^2 = v (W W^T) v^T``: with the D x D product no ``[N, E]`` tensor is made.
    """
    G = v_BGND.shape[1]
    w_GRDE = output_HDE.float().unflatten(0, (G, -1))
    v_BG1ND = v_BGND.float().unsqueeze(2)
    square_BGRN = ((v_BG1ND @ (w_GRDE @ w_GRDE.mT)) * v_BG1ND).sum(dim=-1)
    return square_BGRN.clamp_min(0).sqrt()
