"""Blocks of a stage whose gates are not all open, in vLLM's convention.

A block of vLLM takes and returns ``(delta, residual)``: the stream is their sum, and each norm adds
before it normalises. A closed gate adds nothing: its delta passes on, or is zero.

A prefill attention gate ``kv`` writes the block's keys and values of the stream that reaches it and
computes nothing else: no queries, no attention, no output projection. None of their weights are
there.

Shapes: T tokens of a step, E hidden width, G KV heads, D head width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pdtrim.engines.vllm.compat import (
    LayerNameType,
    _encode_layer_name,
    direct_register_custom_op,
)
from pdtrim.plan import AttentionGate

OP = "pdtrim_write_kv"
SPLITS = f"vllm::{OP}"


class GatedBlock(nn.Module):
    """The parts of a vLLM block that a stage runs, under the block's own parameter names."""

    def __init__(
        self, block: nn.Module, *, attention: AttentionGate | bool, mlp: bool, fused: bool = False
    ) -> None:
        super().__init__()
        own: Any = block
        self.self_attn: nn.Module | None = None
        self.mlp: nn.Module | None = None
        if attention in ("full", True, "kv"):
            self.input_layernorm = own.input_layernorm
            kv_only = attention == "kv"
            self.self_attn = KVOnly(own.self_attn, fused=fused) if kv_only else own.self_attn
        if mlp:
            self.post_attention_layernorm = own.post_attention_layernorm
            self.mlp = own.mlp

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """``(delta, residual)`` behind the block, ``[T, E]`` each."""
        if self.self_attn is not None:
            hidden_states, residual = _add_norm(self.input_layernorm, hidden_states, residual)
            hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        if self.mlp is not None:
            hidden_states, residual = _add_norm(
                self.post_attention_layernorm, hidden_states, residual
            )
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual


def _add_norm(norm: nn.Module, delta: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    if residual is None:  # the embedding is the first stream
        return norm(delta), delta
    normed, stream = norm(delta, residual)
    return normed, stream


class KVOnly(nn.Module):
    """What is left of an attention under gate ``kv``.

    Args:
        fused: the checkpoint holds queries, keys and values as one matrix, so all of it is read.
    """

    def __init__(self, attention: nn.Module, *, fused: bool = False) -> None:
        super().__init__()
        from vllm.model_executor.layers.linear import QKVParallelLinear

        own: Any = attention
        self.head_dim = own.head_dim
        self.skipped = own.q_size if fused else 0
        # a QKV projection of no query head: vLLM's loader fills its k and v shards
        self.qkv_proj = (
            own.qkv_proj
            if fused
            else QKVParallelLinear(
                own.qkv_proj.hidden_size,
                own.head_dim,
                total_num_heads=0,
                total_num_kv_heads=own.qkv_proj.total_num_kv_heads,
                bias=own.qkv_proj.bias is not None,
                prefix=own.qkv_proj.prefix,
            )
        )
        self.rotary_emb = own.rotary_emb
        self.k_norm = getattr(own, "k_norm", None)
        # never called: it owns the layer's cache and its name
        self.attn = own.attn
        if self.attn.attn_backend.forward_includes_kv_cache_update:
            raise ValueError(
                f"attention backend {self.attn.attn_backend.get_name()} writes KV inside its"
                " attention, which a 'kv' gate never runs: choose another --attention-backend"
            )

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """Write K and V of ``[T, E]``; zeros, for the stream."""
        kv, _ = self.qkv_proj(hidden_states)
        k, v = kv[:, self.skipped :].chunk(2, dim=-1)
        heads = (-1, k.shape[-1] // self.head_dim, self.head_dim)
        if self.k_norm is not None:
            k = self.k_norm(k.reshape(heads)).flatten(1)
        # rotated as if it were the query: the rotation is the same
        k, _ = self.rotary_emb(positions, k.contiguous(), None)
        out = torch.zeros_like(hidden_states)
        write = getattr(torch.ops.vllm, OP)
        write(k.view(heads), v.reshape(heads), out, _encode_layer_name(self.attn.layer_name))
        return out


def _write_kv(key: Tensor, value: Tensor, out: Tensor, layer_name: LayerNameType) -> None:
    torch.ops.vllm.unified_kv_cache_update(key, value, layer_name)


def _write_kv_fake(key: Tensor, value: Tensor, out: Tensor, layer_name: LayerNameType) -> None:
    return None


def register() -> None:
    """The op that writes, at which vLLM splits its graphs as at its own; twice does no harm.

    It claims to change ``out``: vLLM's own op claims nothing, and with no attention behind it
    ``torch.compile`` removes it as dead code.
    """
    if not hasattr(torch.ops.vllm, OP):
        direct_register_custom_op(
            op_name=OP, op_func=_write_kv, mutates_args=["out"], fake_impl=_write_kv_fake
        )
