"""Keep the tokens that the prompt's last token attends to, the same for all heads of a layer.

``a[n] = mean over query heads of softmax(q_last k^T scale)[n]``; the best tokens stay.

Paper: TOVA (arXiv 2401.06104). Different from the paper, which drops the weakest token after every
step: one cut, at the handover. Like the paper it favours no token by its place, but for the last
one, which asks; ``first`` and ``last`` can add more.

Shapes: B rows, G KV heads, R query heads a KV head, N prompt tokens.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pdtrim.kv.selectors.base import Mask, SelectorBase
from pdtrim.kv.selectors.scoring import keep_share, window_attention
from pdtrim.kv.view import LayerView
from pdtrim.records import MOST_TOKENS


class Tova(SelectorBase):
    """A share of the tokens, by the last token's attention."""

    mask: ClassVar[Mask] = "token"
    reads_queries: ClassVar[bool] = True

    name: Literal["tova"] = "tova"
    share: float = Field(default=0.5, gt=0, le=1)
    first: int = Field(default=0, ge=0, le=MOST_TOKENS)
    last: int = Field(default=1, ge=0, le=MOST_TOKENS)

    @classmethod
    def sweep(cls, share: float, tokens: int) -> str:
        """See the base class."""
        return f"tova:share={share},first=4"

    def keep(self, view: LayerView, *, block_size: int = 1) -> Tensor:
        """See the base class."""
        B, G, N, _ = view.k_BGND.shape
        if self.first + self.last >= N:
            return torch.ones(B, G, N, dtype=torch.bool, device=view.k_BGND.device)
        attention_BGR1N = window_attention(view.queries(1), view.k_BGND, view.scale)
        score_BN = attention_BGR1N.mean(dim=(1, 2, 3))
        keep_B1N = keep_share(score_BN[:, None], self.share, first=self.first, last=self.last)
        return keep_B1N.expand(B, G, N)
