"""The dense model at work on calibration text, as selectors see it that are fitted.

Shapes: B rows, N prompt tokens handed over, C continuation tokens, H query heads, G KV heads, R = H
/ G, D head width, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pdtrim.kv.selectors import StaticSelector
from pdtrim.models.model import Model
from pdtrim.stage.forward import Batch, Trace, Trimmed
from pdtrim.stage.view import BlockView


@dataclass(frozen=True, kw_only=True, eq=False)
class Observed:
    """A model, a text on the model's device, and what runs only if a policy asks for it.

    Attributes:
        block_size: tokens in a page of the decode engine, to which static rules round.
    """

    model: Model
    batch: Batch
    block_size: int = 1

    @classmethod
    def of(cls, model: Model, batch: Batch, *, block_size: int = 1) -> Observed:
        """Bring the text to the model's device."""
        return cls(model=model, batch=batch.to(model.device), block_size=block_size)

    @cached_property
    def trace(self) -> Trace:
        """The dense model's streams."""
        with torch.inference_mode():
            return Trimmed.dense(self.model).streams(self.batch)

    @property
    def num_layers(self) -> int:
        """Of the model."""
        return self.model.num_layers

    @property
    def num_kv_heads(self) -> int:
        """Of the model."""
        return self.model.num_kv_heads

    @property
    def tokens(self) -> int:
        """N: all of a prompt but its last token."""
        return self.batch.prompt_BP.shape[1] - 1

    @torch.inference_mode()
    def view(self, layer: int) -> BlockView:
        """A layer's prompt."""
        model = self.model
        block, h_BNE = model.block(layer), self._normed(layer, 0)
        rope = model.rope(torch.arange(self.tokens, device=model.device)[None])
        return BlockView(block, h_BNE, *block.project_kv(h_BNE, rope), model.rope)

    @torch.inference_mode()
    def later_queries(self, layer: int) -> Tensor:
        """Rotated queries of the continuation, ``[B, H, C, D]``."""
        N, C = self.tokens, self.batch.continuation_BC.shape[1]
        at = torch.arange(N, N + C, device=self.model.device)[None]
        return self.model.block(layer).project_q(self._normed(layer, 1), self.model.rope(at))

    @torch.inference_mode()
    def concentration(self, rule: StaticSelector) -> Tensor:
        """Share of each head's attention to the prompt that a rule's tokens receive, ``[L, H]``."""
        kept_N = rule.static_keep(1, self.tokens, block_size=self.block_size)[0]
        kept_N = kept_N.to(self.model.device)
        rows = []
        for layer in range(self.num_layers):
            view, q_BHCD = self.view(layer), self.later_queries(layer)
            q_BGRCD = q_BHCD.unflatten(1, (view.k_BGND.shape[1], -1))
            scores = torch.einsum("bgrcd,bgnd->bgrcn", q_BGRCD, view.k_BGND).float() * view.scale
            mass_BGR = scores.softmax(-1)[..., kept_N].sum(-1).mean(-1)
            rows.append(mass_BGR.flatten(1).mean(0))
        return torch.stack(rows).cpu()

    def _normed(self, layer: int, part: int) -> Tensor:
        return self.model.block(layer).attention_norm(self.trace[layer][part])
