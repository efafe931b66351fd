"""The worker's side: which of prefill's pages decode reads, and where it puts them."""

from __future__ import annotations

import time
from typing import Any

import vllm

from pdtrim.engines.pages import page_bytes, pages_of, pages_sent
from pdtrim.engines.vllm.cache import hole_in
from pdtrim.engines.vllm.compat import (
    NIXL_CONNECTOR_VERSION,
    NixlHandshakePayload,
    NixlPullConnectorWorker,
)
from pdtrim.engines.vllm.metrics import (
    HANDOVER,
    SKIPPED_HEAD,
    SKIPPED_LAYER,
    SKIPPED_TOKEN,
    Stats,
    cache_itemsize,
)
from pdtrim.engines.vllm.preempted import HostPages, Pages
from pdtrim.engines.vllm.stage import Served, prefill_to_decode, slot_of
from pdtrim.plan import STAGES

PROTOCOL = 5


def identity(vllm_config: Any, served: Served) -> str:
    """What must be equal on both sides, in words: an error shows it."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    return (
        f"pdtrim/{PROTOCOL} plan {served.plan.digest}, vLLM {vllm.__version__}, NIXL connector"
        f" {NIXL_CONNECTOR_VERSION}, {str(model.dtype).removeprefix('torch.')}, cache"
        f" {vllm_config.cache_config.cache_dtype}, block size"
        f" {vllm_config.cache_config.block_size}, tensor parallel {parallel.tensor_parallel_size}"
    )


class Worker(NixlPullConnectorWorker):
    """vLLM's, with layers mapped through the plan and holes left out."""

    xfer_handshake_metadata: Any

    def __init__(
        self, vllm_config: Any, engine_id: str, kv_cache_config: Any, *, served: Served
    ) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        self.served = served
        self._itemsize = cache_itemsize(vllm_config)
        self._page_tokens: int = vllm_config.cache_config.block_size
        self.xfer_stats = Stats()
        self._to_fail: set[str] = set()
        self._restored: set[str] = set()
        self._began: dict[str, float] = {}

    def _tracks_region_layers(self) -> bool:
        """Advertise which layers lie in a region: both sides speak of layers by name."""
        return True

    def _requires_layer_name_routing(self) -> bool:
        return self.served.stage == "decode"

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Register with NIXL, under our own identity."""
        super().register_kv_caches(kv_caches)
        self.compat_hash = identity(self.vllm_config, self.served)
        self.xfer_handshake_metadata = NixlHandshakePayload(
            compatibility_hash=self.compat_hash,
            agent_metadata_bytes=self.xfer_handshake_metadata.agent_metadata_bytes,
        )
        groups = self.kv_cache_config.transfer_group_index_by_layer
        self._host_pages = HostPages(kv_caches, groups)

    def _align_remote_regions_by_layer(self, nixl_agent_meta: Any) -> None:
        """Call prefill's layers by decode's names; those that decode has not match none."""
        slots = prefill_to_decode(self.served.plan)

        def renamed(name: str) -> str:
            slot = slot_of(name)
            if slot not in slots:
                return f"unread.{name}"
            return name.replace(f"layers.{slot}.", f"layers.{slots[slot]}.")

        nixl_agent_meta.region_members = [
            [renamed(name) for name in region] for region in nixl_agent_meta.region_members
        ]
        super()._align_remote_regions_by_layer(nixl_agent_meta)
        plan, lengths = self.served.plan, nixl_agent_meta.block_lens
        for region, (name,) in enumerate(nixl_agent_meta.region_members):
            layer = self.served.layers[slot_of(name)]
            made, read = (len(plan.kv_heads(stage, layer)) for stage in STAGES)
            # of a page its beginning: the heads that decode keeps come first (widths.py)
            lengths[region] = lengths[region] * read // made

    def add_remote_agent(self, nixl_agent_meta: Any, *args: Any, **kwargs: Any) -> Any:
        """Map a prefill server's regions to decode's cache groups."""
        name = super().add_remote_agent(nixl_agent_meta, *args, **kwargs)
        if self._requires_layer_name_routing():
            self.dst_region_group_ids[nixl_agent_meta.engine_id] = self.region_group_ids
        return name

    def _kernel_pages(self, pages: Pages) -> Pages:
        """Pages as the kernels count them, which may have smaller ones."""
        ratio = self._physical_blocks_per_logical_kv_block
        return tuple(self._logical_to_kernel_block_ids(pages, ratio))

    def keep_preempted(self, metadata: Any) -> None:
        """Copy the prompts that lose their pages in this step, before anything is written there."""
        for request in metadata.pdtrim_finished:
            self._host_pages.drop(request)
        for request, pages in metadata.pdtrim_to_keep.items():
            self._host_pages.keep(request, self._kernel_pages(pages))

    def start_load_kv(self, metadata: Any) -> None:
        """Begin to read what was scheduled."""
        self._to_fail |= metadata.pdtrim_to_fail
        for request, pages in metadata.pdtrim_to_restore.items():
            self._host_pages.restore(request, self._kernel_pages(pages))
            self._restored.add(request)
        now = time.perf_counter()
        for request, meta in metadata.reqs_to_recv.items():
            if meta.awaiting_kvs:
                self._began[request] = now
        super().start_load_kv(metadata)

    def _read_blocks_for_req(self, req_id: str, meta: Any) -> None:
        known = meta.remote.engine_id in self._remote_agents
        if known and any(meta.local_block_ids) and not self._spread(meta):
            self._handle_failed_transfer(req_id, None, self._recv_failures)
            return
        super()._read_blocks_for_req(req_id, meta)

    def _spread(self, meta: Any) -> bool:
        """Give each of decode's cache groups its share of the pages; False if they do not fit."""
        (pages,) = meta.remote.block_ids
        tokens = meta.remote.num_tokens
        groups = []
        computed = meta.local_num_computed_blocks
        for group, found in zip(self.kv_cache_config.transfer_groups, computed, strict=True):
            start, stop = hole_in(group.kv_cache_spec, tokens)
            groups.append([*pages[:start], *pages[stop:]][found:])  # the first are here already
        if [len(ids) for ids in groups] != [len(ids) for ids in meta.local_block_ids]:
            return False
        meta.remote.block_ids = groups
        self._note_skipped(tokens)
        return True

    def _note_skipped(self, tokens: int) -> None:
        plan, size = self.served.plan, self._page_tokens
        whole = pages_of(tokens, size)
        one = (size, self._itemsize)
        skipped = dict.fromkeys((SKIPPED_LAYER, SKIPPED_HEAD, SKIPPED_TOKEN), 0)
        for layer, gate in enumerate(plan.gates.prefill_attention):
            made, read = (page_bytes(plan, layer, *one, stage, self.world_size) for stage in STAGES)
            if layer in plan.sent_layers:
                skipped[SKIPPED_HEAD] += whole * (made - read)
                skipped[SKIPPED_TOKEN] += (whole - pages_sent(plan, layer, tokens, size)) * read
            elif gate != "off":
                skipped[SKIPPED_LAYER] += whole * made
        for reason, nbytes in skipped.items():
            self.xfer_stats.note(reason, nbytes)

    def _arrived(self, results: Any) -> None:
        """What is left to do for requests whose bytes came: of raw pages, nothing."""

    def get_transfer_results(self) -> Any:
        """Add the requests that the scheduler refused, and those that came from the host."""
        results = super().get_transfer_results()
        results.finished_recving |= self._to_fail | self._restored
        results.failed_recving |= self._to_fail
        self._to_fail, self._restored = set(), set()
        self._arrived(results)
        for request in results.finished_recving:
            began = self._began.pop(request, None)
            sound = request not in results.failed_recving
            if began is not None and sound and self.tp_rank == 0:  # or each rank would count it
                self.xfer_stats.note(HANDOVER, time.perf_counter() - began)
        return results
