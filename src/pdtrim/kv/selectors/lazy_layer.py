"""Cut a layer to its first and last tokens in those prompts in which it looks at little else.

``mass = mean over query heads of the last token's attention to [0, first) + [N - last, N)``. If
``mass > tau`` the layer is lazy in this prompt and keeps those tokens only; else it keeps all.

Paper: SimLayerKV (arXiv 2410.13846), with tau 0.9 (Llama 3), 0.8 (Mistral) and 0.85 (Qwen).
Different from the paper: the last token that prefill ran decides, the prompt's last but one.

Shapes: B rows, G KV heads, R query heads a KV head, N prompt tokens.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from pdtrim.kv.selectors.base import Mask, SelectorBase
from pdtrim.kv.selectors.first_last import first_last
from pdtrim.kv.selectors.scoring import window_attention
from pdtrim.kv.view import LayerView
from pdtrim.records import MOST_TOKENS


class LazyLayer(SelectorBase):
    """First and last tokens where the layer is lazy, every token where it is not."""

    mask: ClassVar[Mask] = "token"
    reads_queries: ClassVar[bool] = True

    name: Literal["lazy_layer"] = "lazy_layer"
    first: int = Field(default=4, ge=0, le=MOST_TOKENS)
    last: int = Field(default=1024, ge=1, le=MOST_TOKENS)
    tau: float = Field(default=0.9, ge=0, le=1)

    def keep(self, view: LayerView, *, block_size: int = 1) -> Tensor:
        """See the base class."""
        B, G, N, _ = view.k_BGND.shape
        edge_N = first_last(N, first=self.first, last=self.last).to(view.k_BGND.device)
        if self.first + self.last >= N:
            return edge_N.expand(B, G, N)
        attention_BGR1N = window_attention(view.queries(1), view.k_BGND, view.scale)
        lazy_B = lazy_mass(attention_BGR1N.squeeze(3), edge_N) > self.tau
        return (edge_N | ~lazy_B[:, None])[:, None].expand(B, G, N)


def lazy_mass(attention_BGRN: Tensor, edge_N: Tensor) -> Tensor:
    """Attention mass ``[B]`` on the tokens of ``edge_N``, mean over the query heads."""
    return attention_BGRN.masked_fill(~edge_N, 0).sum(dim=-1).mean(dim=(1, 2))
