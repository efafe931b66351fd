"""Keep the tokens that the prompt's last token attends to, the same for all heads of a layer.

``a[n] = mean over query heads of softmax(q_last k^T scale)[n]``; the best tokens stay.

Paper: TOVA (arXiv 2401.06104). Different from the paper, which drops the weakest token after every
step: one cut, at the handover. Like the paper it favours no token by its place, but for the last
one, which asks; ``first`` and ``last`` can add more.

Shapes: B rows, G KV heads, R query heads a KV head, N prompt tokens.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from pdtrim.kv.selectors.base import Mask
from pdtrim.kv.selectors.scoring import ShareSelector, window_attention
from pdtrim.kv.view import LayerView
from pdtrim.records import MOST_TOKENS


class Tova(ShareSelector):
    """A share of the tokens, by the last token's attention."""

    mask: ClassVar[Mask] = "token"

    name: Literal["tova"] = "tova"
    first: int = Field(default=0, ge=0, le=MOST_TOKENS)
    last: int = Field(default=1, ge=0, le=MOST_TOKENS)

    @classmethod
    def sweep(cls, share: float, tokens: int) -> str:
        """See the base class."""
        return f"tova:share={share},first=4"

    def ends(self, tokens: int) -> tuple[int, int]:
        """See the base class."""
        return self.first, self.last

    def score(self, view: LayerView) -> Tensor:
        """See the base class."""
        attention_BGR1N = window_attention(view.queries(1), view.k_BGND, view.scale)
        return attention_BGR1N.mean(dim=(1, 2, 3))[:, None]
