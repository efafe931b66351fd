"""The worker's side of a plan with codecs: one coded range a prompt instead of its pages."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from pdtrim.engines.pages import bytes_sent
from pdtrim.engines.ranges import NONCE_BYTES, Form, Pool, Ticket
from pdtrim.engines.vllm.coded import Encoded, Job, forms, staging_bytes
from pdtrim.engines.vllm.compat import (
    NixlAgentMetadata,
    NixlHandshakePayload,
    NixlPullConnectorWorker,
)
from pdtrim.engines.vllm.kv_bias import StageBias
from pdtrim.engines.vllm.metrics import REFUSED, SKIPPED_CODEC
from pdtrim.engines.vllm.pages_io import check_readable, gather, numbers, scatter, slots
from pdtrim.engines.vllm.stage import Served, slot_of
from pdtrim.engines.vllm.worker import Worker
from pdtrim.errors import WireError
from pdtrim.kv.kernels import together

logger = logging.getLogger("vllm.pdtrim")

REGION = "pdtrim.staging"
WARM_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class RemotePool:
    """Where prefill's pool lies."""

    address: int
    size: int
    device: int
    memory: str


class CodedWorker(Worker):
    """Encodes on prefill; reads, checks and decodes on decode."""

    def __init__(
        self, vllm_config: Any, engine_id: str, kv_cache_config: Any, *, served: Served
    ) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config, served=served)
        self._form = forms(vllm_config, served)
        self._bias = StageBias(vllm_config, served)
        self._pool = Pool(staging_bytes(vllm_config, served))
        self._remote_pools: dict[str, RemotePool] = {}
        self._encoded: dict[str, int] = {}
        self._reading: dict[str, tuple[Ticket, Any]] = {}
        self._waiting: list[tuple[str, Any]] = []

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Register the pool beside the cache, and advertise it as one more region."""
        self._caches = {self.served.layers[slot_of(name)]: name for name in kv_caches}
        self._context = self.vllm_config.compilation_config.static_forward_context
        if self.served.stage == "prefill":
            for layer in self.served.plan.sent_layers:
                name = self._caches[layer]
                check_readable(self._context[name], kv_caches[name])
        host = self.nixl_memory_type == "DRAM"
        device = torch.device("cpu") if host else next(iter(kv_caches.values())).device
        self._staging = torch.zeros(self._pool.size, dtype=torch.uint8, device=device)
        region = (self._staging.data_ptr(), self._pool.size, max(0, self._staging.get_device()))
        descs = self.nixl_wrapper.get_reg_descs([(*region, "")], self.nixl_memory_type)
        # first: what follows exports the agent with the memory that it knows
        self.nixl_wrapper.register_memory(descs, backends=self.nixl_backends)
        self._registered_descs.append(descs)
        if self._staging.is_cuda:
            self._warm()
        super().register_kv_caches(kv_caches)
        payload = self.xfer_handshake_metadata
        meta = msgspec.msgpack.decode(payload.agent_metadata_bytes, type=NixlAgentMetadata)
        _add_region(meta, *region[:2], self.nixl_memory_type)
        self.xfer_handshake_metadata = NixlHandshakePayload(
            compatibility_hash=payload.compatibility_hash,
            agent_metadata_bytes=msgspec.msgpack.encode(meta),
        )

    def _warm(self) -> None:
        """Compile the codecs' kernels, for which the first prompt would wait."""
        tokens = min(self.vllm_config.model_config.max_model_len, WARM_TOKENS)
        form, nonce = self._form(tokens), bytes(NONCE_BYTES)
        room = self._staging[: form.most]
        shapes = ((2, part.heads, part.tokens, form.width) for part in form.parts)
        made = (torch.randn(shape, dtype=form.dtype, device=room.device) for shape in shapes)
        size = form.write(room, nonce, (tuple(kv) for kv in made))
        list(form.read(room[:size], nonce))
        room.zero_()

    def _align_remote_regions_by_layer(self, nixl_agent_meta: Any) -> None:
        """Take prefill's pool out of its regions."""
        if [REGION] in nixl_agent_meta.region_members:  # a second pass finds none
            pool = _take_region(nixl_agent_meta)
            self._remote_pools[nixl_agent_meta.engine_id] = pool
        super()._align_remote_regions_by_layer(nixl_agent_meta)

    def _cleanup_remote_engine(self, engine_id: str, *, log_eviction: bool = True) -> None:
        """Forget a prefill server's pool with the rest of it."""
        self._remote_pools.pop(engine_id, None)
        super()._cleanup_remote_engine(engine_id, log_eviction=log_eviction)

    def _cache_of(self, layer: int) -> tuple[Any, torch.Tensor]:
        name = self._caches[layer]
        return self._context[name], self.device_kv_caches[name]

    def encode(self, metadata: Any) -> None:
        """Encode the prompts that this step's forward has ended, on the same stream."""
        for request, job in metadata.pdtrim_to_encode.items():
            form = self._form(job.tokens)
            room = self._staging[job.ticket.offset :][: form.most]
            self._encoded[request] = form.write(room, job.ticket.nonce, self._kept(form, job))

    def _kept(self, form: Form, job: Job) -> Iterator[tuple[torch.Tensor, ...]]:
        """Keys and values ``[G, M, D]`` of each part, without its biases."""
        pages: dict[tuple[int, int], torch.Tensor] = {}
        for part in form.parts:
            start, stop = part.hole
            if part.hole not in pages:
                (here,) = self._kernel_pages(([*job.pages[:start], *job.pages[stop:]],))
                pages[part.hole] = numbers(here, self._staging.device)
            k_GMD, v_GMD = gather(*self._cache_of(part.layer), pages[part.hole], part.tokens)
            kv = k_GMD[: part.heads], v_GMD[: part.heads]  # decode's come first (widths.py)
            yield self._bias.taken_from(part, job.tokens - 1, kv)

    def take_encoded(self) -> Encoded | None:
        """What was encoded since the last call."""
        sizes, self._encoded = self._encoded, {}
        return Encoded(sizes) if sizes else None

    def start_load_kv(self, metadata: Any) -> None:
        """Begin to read what was scheduled, those first that found no room before."""
        for request, ticket in metadata.pdtrim_tickets.items():
            metadata.reqs_to_recv[request].pdtrim_ticket = ticket
        waiting, self._waiting = self._waiting, []
        for request, meta in waiting:
            self._read_blocks_for_req(request, meta)
        super().start_load_kv(metadata)

    def _read_blocks_for_req(self, req_id: str, meta: Any) -> None:
        engine = meta.remote.engine_id
        known = engine in self._remote_agents and engine not in self._invalid_remote_engines
        if not known or not any(meta.local_block_ids):  # a handshake, a failure, a notice only
            NixlPullConnectorWorker._read_blocks_for_req(self, req_id, meta)
            return
        ticket, remote = meta.pdtrim_ticket, self._remote_pools[engine]
        if ticket.offset + ticket.nbytes > remote.size or ticket.nbytes > self._pool.size:
            self._refuse(req_id, f"its range is not within prefill's pool of {remote.size} bytes")
            self._handle_failed_transfer(req_id, None, self._recv_failures)
        elif not self._pool.reserve(req_id, ticket.nbytes):
            self._waiting.append((req_id, meta))
        elif not self._spread(meta):
            self._pool.release(req_id)
            self._handle_failed_transfer(req_id, None, self._recv_failures)
        else:
            self._reading[req_id] = ticket, meta
            self._note_coded(meta.remote.num_tokens, ticket.nbytes)
            self._read(req_id, ticket, remote, meta.remote)

    def _note_coded(self, tokens: int, nbytes: int) -> None:
        raw = bytes_sent(self.served.plan, tokens, self._page_tokens, self._itemsize)
        self.xfer_stats.note(SKIPPED_CODEC, max(0, raw - nbytes))

    def _read(self, request: str, ticket: Ticket, remote: RemotePool, source: Any) -> None:
        """Post one READ of the whole range; vLLM polls it as one of its own."""
        nixl, handle = self.nixl_wrapper, None
        own = self._staged(request, ticket)
        local = (own.data_ptr(), ticket.nbytes, max(0, own.get_device()))
        away = (remote.address + ticket.offset, ticket.nbytes, remote.device)
        self._recving_transfers.setdefault(request, [])
        try:
            handle = nixl.initialize_xfer(
                "READ",
                nixl.get_xfer_descs([local], self.nixl_memory_type),
                nixl.get_xfer_descs([away], remote.memory),
                self._remote_agents[source.engine_id][(0, 0)],
                f"{source.request_id}:1".encode(),
            )
            nixl.transfer(handle)
            self._recving_transfers[request].append(handle)
        except Exception as error:  # of any kind, as vLLM's own reads
            self._log_failure(
                failure_type="transfer_setup_failed",
                req_id=request,
                error=error,
                dst_engine_id=source.engine_id,
            )
            if not self._handle_failed_transfer(request, handle, self._recv_failures):
                self._recving_transfers[request].append(handle)

    def _staged(self, request: str, ticket: Ticket) -> torch.Tensor:
        return self._staging[self._pool.offset(request) :][: ticket.nbytes]

    def _arrived(self, results: Any) -> None:
        """Decode what came whole; refuse the rest."""
        for request in self._reading.keys() & results.finished_recving:
            ticket, meta = self._reading.pop(request)
            if request not in results.failed_recving:
                try:
                    self._decode(self._staged(request, ticket), ticket, meta)
                except WireError as error:
                    self._refuse(request, str(error))
                    results.failed_recving.add(request)
            self._pool.release(request)

    def _decode(self, staged: torch.Tensor, ticket: Ticket, meta: Any) -> None:
        groups = self.kv_cache_config.transfer_group_index_by_layer
        tokens, slots_of = meta.remote.num_tokens, dict[int, torch.Tensor]()
        with together():  # pages of a request that is refused are never read
            for part, *coded in self._form(tokens).read(staged, ticket.nonce):
                k_GMD, v_GMD = self._bias.added_to(part, tokens - 1, (coded[0], coded[1]))
                attention, cache = self._cache_of(part.layer)
                group = groups[self._caches[part.layer]]
                if group not in slots_of:  # layers of one group have one rule, so one hole
                    pages_B = numbers(list(meta.local_physical_block_ids[group]), cache.device)
                    slots_of[group] = slots(pages_B, cache.shape[2], part.tokens)
                scatter(attention, cache, slots_of[group], k_GMD, v_GMD)
        if staged.is_cuda:  # no stream orders the next READ into this range
            torch.cuda.current_stream(staged.device).synchronize()

    def _refuse(self, request: str, problem: str) -> None:
        logger.error("request %s refused: %s", request, problem)
        self.xfer_stats.note(REFUSED, 1)


def _add_region(meta: Any, address: int, size: int, memory: str) -> None:
    meta.kv_caches_base_addr.append(address)
    meta.block_lens.append(size)
    meta.block_strides.append(size)
    meta.region_members.append([REGION])
    for values, value in (
        (meta.region_num_blocks, 1),
        (meta.region_group_ids, 0),
        (meta.region_names, REGION),
        (meta.region_mem_types, memory),
    ):
        if values is not None:
            values.append(value)


def _take_region(meta: Any) -> RemotePool:
    """The inverse: vLLM's own regions are left."""
    at = meta.region_members.index([REGION])
    memory = meta.region_mem_types[at]
    address, size = meta.kv_caches_base_addr[at], meta.block_lens[at]
    for values in (
        meta.kv_caches_base_addr,
        meta.block_lens,
        meta.block_strides,
        meta.region_members,
        meta.region_num_blocks,
        meta.region_group_ids,
        meta.region_names,
        meta.region_mem_types,
    ):
        if values is not None:
            del values[at]
    return RemotePool(address=address, size=size, device=meta.device_id, memory=memory)
