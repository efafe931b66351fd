"""Attention of a trimmed layer: the block table without its null blocks.

Keys carry their rotary position, so a kernel that walks a compacted table over fewer tokens
computes exactly the attention of the kept tokens, if the hole lies before all queries. It does:
the hole is in the prompt, and decode's first query is the prompt's last token.

Shapes: R requests of a batch, P pages of a block table's row.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pdtrim.engines.vllm.cache import TrimmedSpec
from pdtrim.engines.vllm.compat import Attention, AttentionCGSupport, subclass_attention_backend

NULL = 0  # vLLM's null block


def compact(table_RP: Tensor, lengths_R: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """The table with null blocks moved behind the others, and lengths without their tokens.

    A row whose last page is null is not a request but padding, and stays as it is.
    """
    pages_R = (lengths_R + block_size - 1) // block_size
    at_P = torch.arange(table_RP.shape[1], device=table_RP.device)
    valid_RP = at_P[None] < pages_R[:, None]
    last_R = table_RP.gather(1, (pages_R - 1).clamp(min=0)[:, None].long())[:, 0]
    hole_RP = valid_RP & (table_RP == NULL) & (last_R != NULL)[:, None]
    order_RP = (hole_RP | ~valid_RP).byte().argsort(dim=1, stable=True)
    lengths = lengths_R - hole_RP.sum(1) * block_size
    return table_RP.gather(1, order_RP), lengths.to(lengths_R.dtype)


@functools.lru_cache
def trimmed_backend(backend: type) -> type:
    """An attention backend of vLLM that compacts first."""
    base: Any = backend.get_builder_cls()  # type: ignore[attr-defined]

    class TrimmedBuilder(base):
        """Metadata over the compacted table."""

        # the compacted table is a new tensor each step, which a CUDA graph would not see
        _cudagraph_support = AttentionCGSupport.NEVER

        def build(
            self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
        ) -> Any:
            common = common_attn_metadata
            table, lengths = compact(
                common.block_table_tensor, common.seq_lens, self.kv_cache_spec.block_size
            )
            # other groups share the old tensors
            common = common.replace(block_table_tensor=table, seq_lens=lengths)
            return super().build(0, common, fast_build)

    return subclass_attention_backend("Trimmed", backend, TrimmedBuilder)


class TrimmedAttention(Attention):
    """An attention layer of vLLM under a ``first_last`` rule."""

    pdtrim_first: int
    pdtrim_last: int

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        """Its own kind, so that its pages are allocated around the hole."""
        spec = super().get_kv_cache_spec(vllm_config)
        return TrimmedSpec(
            block_size=spec.block_size,
            num_kv_heads=spec.num_kv_heads,
            head_size=spec.head_size,
            head_size_v=spec.head_size_v,
            dtype=spec.dtype,
            kv_quant_mode=spec.kv_quant_mode,
            first=self.pdtrim_first,
            last=self.pdtrim_last,
        )


def trim(attention: Attention, *, first: int, last: int) -> None:
    """Put a layer under a rule, after vLLM has built it."""
    attention.__class__ = TrimmedAttention
    attention.pdtrim_first, attention.pdtrim_last = first, last
    attention.attn_backend = trimmed_backend(attention.attn_backend)
