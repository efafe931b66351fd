"""Phi-3, with Phi-3.5 and Phi-4 where RoPE is plain: queries, keys and values in one projection.

Gate and up are one projection too. A stage that makes keys and values of a block only holds the
whole fused matrix, but runs its rows of keys and values alone. transformers' own layer cannot run
a narrower block, since it cuts the fused rows where the config's head counts say; pdtrim's does.
"""

from __future__ import annotations

from torch import Tensor

from pdtrim.models.block import Block, Made, Projection
from pdtrim.models.emulated import linear
from pdtrim.models.mistral import MistralBlock

QKV = "self_attn.qkv_proj"


class Phi3Block(MistralBlock):
    """Llama's block with fused projections, and Mistral's one window for all layers."""

    biases_every_key = False  # it has none
    PROJECTIONS = (
        Projection(name=QKV, makes=("queries", "keys", "values"), unit="group"),
        Block.making("attention"),
        Projection(name="mlp.gate_up_proj", makes=("gate", "up"), unit="neuron"),
        Block.making("mlp"),
    )
    KV_PARTS = ("input_layernorm", QKV)
    ATTENTION_PARTS = (*KV_PARTS, Block.making("attention").name)

    def _heads(self, made: Made, norm: str | None, h_BTE: Tensor) -> Tensor:
        del norm
        x_BTF = linear(h_BTE, self.matrix(made).weight[self.span(made)])
        return x_BTF.unflatten(-1, (-1, self.attention.head_dim)).transpose(1, 2)
