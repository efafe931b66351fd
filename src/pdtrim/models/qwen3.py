"""Qwen3: Qwen2's windows, no biases, and an RMS norm over each query and key head.

The norm comes before the rotation.
"""

from torch import Tensor

from pdtrim.models.block import Made
from pdtrim.models.qwen2 import Qwen2Block


class Qwen3Block(Qwen2Block):
    """Qwen2's block with per-head norms on queries and keys."""

    biases_every_key = False  # a norm follows the projection
    KV_PARTS = (*Qwen2Block.KV_PARTS, "self_attn.k_norm")
    ATTENTION_PARTS = (*Qwen2Block.ATTENTION_PARTS, "self_attn.q_norm", "self_attn.k_norm")

    def _heads(self, made: Made, norm: str | None, h_BTE: Tensor) -> Tensor:
        x_BHTD = super()._heads(made, None, h_BTE)
        return x_BHTD if norm is None else getattr(self.attention, norm)(x_BHTD)
