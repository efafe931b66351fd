"""Keep the pairs that the prompt's last tokens attend to.

``a[h, n] = sum over the last W queries of softmax(q k^T scale)[n]``, each query blind to what
follows it; pooled along the tokens before the window with width ``pool``; then the mean over the
query heads of a KV head. The best pairs stay, with the first tokens and the window. With
``value_norm`` each query head's score is multiplied by ``|v W_o|`` first.

Papers: SnapKV (arXiv 2404.14469), CriticalKV (2502.03805) for the value norm. Different from
SnapKV: first tokens always stay, and the share counts the window. Different from CriticalKV, which
fills half of the budget without the norm: the norm weighs every choice, and it is Euclidean, not
the sum of magnitudes, because that takes a D x D product in place of the whole output projection.

Shapes: B rows, G KV heads, R query heads a KV head, W window, N prompt tokens, P = N - W.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from pdtrim.kv.selectors.base import Mask
from pdtrim.kv.selectors.scoring import ShareSelector, value_norm, window_attention
from pdtrim.kv.view import LayerView
from pdtrim.records import MOST_TOKENS

Pooling = Literal["average", "max"]


class SnapKV(ShareSelector):
    """A share of the pairs, by the attention of an observation window."""

    name: Literal["snapkv"] = "snapkv"
    first: int = Field(default=4, ge=0, le=MOST_TOKENS)
    window: int = Field(default=64, ge=1, le=MOST_TOKENS)
    pool: int = Field(default=5, ge=1, le=1023)
    pooling: Pooling = "average"
    heads: Literal["own", "shared"] = "own"
    value_norm: bool = False

    @field_validator("pool")
    @classmethod
    def _odd(cls, pool: int) -> int:
        if pool % 2 == 0:
            raise ValueError("must be odd, to be centred on its token")
        return pool

    @property
    def mask(self) -> Mask:
        """All heads keep the same tokens when they share a score."""
        return "token" if self.heads == "shared" else "pair"

    @property
    def reads_output(self) -> bool:
        """Only the value norm needs the output projection."""
        return self.value_norm

    @classmethod
    def sweep(cls, share: float, tokens: int) -> str:
        """See the base class."""
        window = max(4, min(32, tokens // 16))
        return f"snapkv:share={share},window={window},value_norm=true"

    def ends(self, tokens: int) -> tuple[int, int]:
        """See the base class."""
        return self.first, self.window

    def score(self, view: LayerView) -> Tensor:
        """See the base class."""
        attention_BGRWN = window_attention(view.queries(self.window), view.k_BGND, view.scale)
        score_BGRN = window_score(attention_BGRWN, self.pool, self.pooling)
        if self.value_norm:
            score_BGRN = score_BGRN * value_norm(view.v_BGND, view.output_weight())
        score_BGN = score_BGRN.mean(dim=2)
        return score_BGN.mean(dim=1, keepdim=True) if self.heads == "shared" else score_BGN


def window_score(attention_BGRWN: Tensor, pool: int, pooling: Pooling) -> Tensor:
    """Pooled sums over the window, ``[B, G, R, N]``; 0 on the window's own tokens.

    Those are kept anyway, and pooling over them would lend their attention to their neighbours.
    """
    W, N = attention_BGRWN.shape[-2:]
    sum_BGRP = attention_BGRWN[..., : N - W].sum(dim=-2)
    run = F.avg_pool1d if pooling == "average" else F.max_pool1d
    pooled = run(sum_BGRP.flatten(0, 2)[:, None], pool, stride=1, padding=pool // 2)
    return F.pad(pooled.view(sum_BGRP.shape), (0, W))
