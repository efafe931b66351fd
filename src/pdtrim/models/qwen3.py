"""Qwen3: no biases, and an RMS norm over each query and key head before the rotation."""

from torch import Tensor

from pdtrim.models.block import Block


class Qwen3Block(Block):
    """Llama's block with per-head norms on queries and keys."""

    KV_PARTS = (*Block.KV_PARTS, "self_attn.k_norm")
    ATTENTION_PARTS = (*Block.ATTENTION_PARTS, "self_attn.q_norm", "self_attn.k_norm")

    def _heads(self, projection: str, norm: str | None, h_BTE: Tensor) -> Tensor:
        x_BHTD = super()._heads(projection, None, h_BTE)
        return x_BHTD if norm is None else getattr(self.attention, norm)(x_BHTD)
