"""Keep the pairs that the whole prompt attends to most, and the most recent ones.

``a[g, n] = sum over the query heads of KV head g and over the queries m >= n of
softmax(q_m k^T scale)[n]``, each query blind to what follows it. ``recent`` of the budget goes to
the last tokens, the rest to the pairs of largest ``a`` among the others: the heavy hitters.

Paper: H2O (arXiv 2306.14048), which splits the budget in halves, as the default here does.
Different from the paper, which evicts at every step, in the prompt too, so that its sums run over
what was still kept, and goes on with the tokens that decode adds: the whole prompt is scored at
once, one cut is made, at the handover, and decode's tokens all stay. The query heads of a KV head
are added up; the paper's models have one for each. As in the paper, an early token is asked by
more queries than a late one, and nothing makes up for that.

Shapes: B rows, N prompt tokens, G KV heads, H query heads, R = H / G, D head width, C queries at a
time, S keys up to the last of them.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pdtrim.kv.selectors.base import Mask
from pdtrim.kv.selectors.scoring import ShareSelector, window_attention
from pdtrim.kv.view import LayerView

CHUNK = 64  # queries; 32k tokens and 32 heads make 256 MiB of logits, all queries 128 GiB


class H2O(ShareSelector):
    """A share of the pairs: heavy hitters and the most recent tokens."""

    mask: ClassVar[Mask] = "pair"

    name: Literal["h2o"] = "h2o"
    recent: float = Field(default=0.5, ge=0, le=1)

    @classmethod
    def sweep(cls, share: float, tokens: int) -> str:
        """See the base class."""
        return f"h2o:share={share}"

    def ends(self, tokens: int) -> tuple[int, int]:
        """See the base class."""
        # as keep_share rounds: 0.07 * 100 must not become 8
        return 0, math.ceil(self.recent * self.share * tokens - 1e-9)

    def score(self, view: LayerView) -> Tensor:
        """See the base class."""
        return attention_mass(view.queries(view.k_BGND.shape[2]), view.k_BGND, view.scale)


def attention_mass(q_BHND: Tensor, k_BGND: Tensor, scale: float, *, chunk: int = CHUNK) -> Tensor:
    """Attention that each pair receives from all queries of its KV head, fp32 ``[B, G, N]``.

    Args:
        chunk: queries at a time, so that no ``[N, N]`` tensor is made.
    """
    B, G, N, _ = k_BGND.shape
    mass_BGN = torch.zeros(B, G, N, device=k_BGND.device)
    for start in range(0, N, chunk):
        stop = min(start + chunk, N)
        q_BHCD, k_BGSD = q_BHND[:, :, start:stop], k_BGND[:, :, :stop]
        mass_BGN[..., :stop] += window_attention(q_BHCD, k_BGSD, scale).sum(dim=(2, 3))
    return mass_BGN
