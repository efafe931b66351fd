"""Decode's cache: no memory for what the plan drops, and nothing shared but what prefill wrote.

The dropped pages of a prompt stand in the block table as vLLM's null block from the first
allocation on. Only a prompt that comes by handover has the hole: one that decode computes itself
(``local_prefill``) holds every page, since a page that was written is never taken back while the
worker's table still names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pdtrim.engines.pages import hole, pages_of
from pdtrim.engines.vllm.compat import (
    AttentionSpec,
    FullAttentionManager,
    FullAttentionSpec,
    KVCacheSpecRegistry,
    iter_layer_specs,
)


@dataclass(frozen=True, kw_only=True)
class TrimmedSpec(AttentionSpec):
    """Keys and values of a layer under ``first_last``.

    Not a ``FullAttentionSpec``: vLLM would put the layer into the group of the full ones.
    """

    first: int
    last: int

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """As full attention: a long generation after a short prompt has no hole."""
        tokens = vllm_config.model_config.max_model_len
        return pages_of(tokens, self.block_size) * self.page_size_bytes

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, Any]) -> bool:
        """Whether all layers share one block table: the same rule."""
        return all(
            isinstance(spec, TrimmedSpec) and (spec.first, spec.last) == (self.first, self.last)
            for spec in kv_cache_specs.values()
        )

    def hole(self, prompt_tokens: int) -> tuple[int, int]:
        """Pages that a prompt does not have here."""
        return hole(prompt_tokens, self.block_size, first=self.first, last=self.last)


class TrimmedManager(FullAttentionManager):
    """Allocates around the hole."""

    supports_fine_grained_hash_lookup = False

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[Any], ...], int]:
        """Never: a cached page says nothing of the hole before it."""
        return tuple([] for _ in kv_cache_group_ids), 0

    def cache_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to look up later."""

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[Any],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """What full attention needs, less the hole of a prompt that is handed over."""
        count = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            *args,
            **kwargs,
        )
        is_new = request_id not in self.num_cached_block
        if is_new and total_computed_tokens > num_local_computed_tokens:
            start, stop = self.kv_cache_spec.hole(total_computed_tokens)
            count -= stop - start
        return count

    def allocate_external_computed_blocks(
        self,
        request_id: str,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        record_for_zeroing: bool = True,
    ) -> None:
        """Pages for a prompt that is handed over, with null blocks in the hole."""
        tokens = num_local_computed_tokens + num_external_computed_tokens
        blocks = self.req_to_blocks[request_id]
        assert not blocks and num_local_computed_tokens == 0  # no prefix caching here
        count = pages_of(tokens, self.block_size)
        start, stop = self.kv_cache_spec.hole(tokens)
        new = self.block_pool.get_new_blocks(count - (stop - start))
        blocks.extend([*new[:start], *[self._null_block] * (stop - start), *new[start:]])
        if self._record_new_block_ids and record_for_zeroing:
            self.new_block_ids.extend(block.block_id for block in new)


def hole_in(group_spec: Any, prompt_tokens: int) -> tuple[int, int]:
    """Pages that a prompt does not have in a group of the cache; its layers have one rule.

    Args:
        group_spec: of one kind of layer, or of several that differ in their KV heads.
    """
    spec = next(iter(iter_layer_specs(group_spec)))
    return spec.hole(prompt_tokens) if isinstance(spec, TrimmedSpec) else (0, 0)


@dataclass(frozen=True, kw_only=True)
class SharedSpec(FullAttentionSpec):
    """Keys and values of a whole layer whose pages several prompts may share."""


class SharedManager(FullAttentionManager):
    """Finds again what came by handover only.

    Decode's blocks are not prefill's: what decode writes for an answer, and for a prompt's last
    token, is not what prefill would send for the same tokens in the next prompt.
    """

    supports_fine_grained_hash_lookup = False

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Of the tokens so far, those that were handed over."""
        handed_over = min(num_tokens, request.num_prompt_tokens - 1)
        super().cache_blocks(request, handed_over, *args, **kwargs)


def register() -> None:
    """Tell vLLM which manager allocates for which spec; twice does no harm."""
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(TrimmedSpec, TrimmedManager)
    KVCacheSpecRegistry.register(SharedSpec, SharedManager, FullAttentionSpec)
