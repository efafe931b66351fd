"""Attention of a trimmed layer: the block table without its null blocks.

Keys carry their rotary position, so a kernel that walks a compacted table over fewer tokens
computes exactly the attention of the kept tokens, if the hole lies before all queries. It does:
the hole is in the prompt, and decode's first query is the prompt's last token.

Shapes: R requests of a batch, P pages of a block table's row.
"""

from __future__ import annotations

import functools
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from pdtrim.engines.vllm.cache import SharedSpec, TrimmedSpec
from pdtrim.engines.vllm.compat import Attention, subclass_attention_backend


def compact(
    table_RP: Tensor, lengths_R: Tensor, block_size: int, *, nulls: int = 1
) -> tuple[Tensor, Tensor]:
    """The table without each row's hole, and lengths without the hole's tokens.

    A hole is one run of null blocks. What stands behind a row's new last page means nothing. A row
    whose last page is null is not a request but padding, and stays as it is.

    Args:
        block_size: tokens of a page of this table.
        nulls: page numbers below it are vLLM's null block, which a kernel of smaller pages splits.
    """
    pages = table_RP.shape[1]
    pages_R = (lengths_R + block_size - 1) // block_size
    at_P = torch.arange(pages, device=table_RP.device)
    last_R = table_RP.gather(1, (pages_R - 1).clamp(min=0)[:, None].long())[:, 0]
    hole_RP = (table_RP < nulls) & (at_P[None] < pages_R[:, None]) & (last_R >= nulls)[:, None]
    dropped_R, start_R = hole_RP.sum(1), hole_RP.byte().argmax(1)
    from_RP = at_P[None] + (at_P[None] >= start_R[:, None]) * dropped_R[:, None]
    lengths = lengths_R - dropped_R * block_size
    return table_RP.gather(1, from_RP.clamp_(max=pages - 1)), lengths.to(lengths_R.dtype)


@functools.lru_cache
def trimmed_backend(backend: type) -> type:
    """An attention backend of vLLM that compacts first."""
    base: Any = backend.get_builder_cls()  # type: ignore[attr-defined]

    class TrimmedBuilder(base):
        """Metadata over the compacted table.

        The table and the lengths of every step lie where those of the first step lay: a CUDA graph
        reads the addresses that it was captured with.
        """

        # metadata that are made for one group must not be lent to another, whose table is whole
        supports_update_block_table = False

        def __init__(
            self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any
        ) -> None:
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)
            self._nulls = vllm_config.cache_config.block_size // kv_cache_spec.block_size
            self._rows = max(
                vllm_config.scheduler_config.max_num_seqs,
                vllm_config.compilation_config.max_cudagraph_capture_size or 0,
            )
            self._stays: tuple[Tensor, Tensor] | None = None

        def build(
            self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
        ) -> Any:
            common = common_attn_metadata
            made = compact(
                common.block_table_tensor,
                common.seq_lens,
                self.kv_cache_spec.block_size,
                nulls=self._nulls,
            )
            if self._stays is None:
                table_RP, lengths_R = (x.new_zeros(self._rows, *x.shape[1:]) for x in made)
                self._stays = table_RP, lengths_R
            table_RP, lengths_R = (
                stays[: len(x)].copy_(x) for stays, x in zip(self._stays, made, strict=True)
            )
            # other groups share the tensors that came
            common = common.replace(block_table_tensor=table_RP, seq_lens=lengths_R)
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


class SharedAttention(Attention):
    """A whole attention layer of vLLM, of a decode with a prefix cache."""

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        """Its own kind, so that the cache holds what was handed over only."""
        spec = super().get_kv_cache_spec(vllm_config)
        return SharedSpec(**{field.name: getattr(spec, field.name) for field in fields(spec)})
