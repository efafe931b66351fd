"""The worker's side of a plan with codecs: one coded range a prompt instead of its pages."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec
import torch

from pdtrim.engines.pages import bytes_sent
from pdtrim.engines.ranges import NONCE_BYTES, Batch, Form, Part, Pool, Ticket
from pdtrim.engines.vllm.coded import Told, forms, staging_bytes
from pdtrim.engines.vllm.compat import (
    NixlAgentMetadata,
    NixlHandshakePayload,
    NixlPullConnectorWorker,
)
from pdtrim.engines.vllm.kv_bias import StageBias
from pdtrim.engines.vllm.metrics import SKIPPED_CODEC
from pdtrim.engines.vllm.pages_io import (
    Rows,
    check_readable,
    gather,
    numbers,
    rows_of,
    scatter,
    slots,
)
from pdtrim.engines.vllm.stage import Served, slot_of
from pdtrim.engines.vllm.worker import Worker
from pdtrim.errors import WireError
from pdtrim.kv.kernels import together

logger = logging.getLogger("vllm.pdtrim")

REGION = "pdtrim.staging"
WARM_TOKENS = 1024
POLL_SECONDS = 0.001
"""What vLLM's engine sleeps between two steps that run nothing."""


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
        self._bias = StageBias(vllm_config, served, rank=self.tp_rank, ranks=self.world_size)
        self._pool = Pool(staging_bytes(vllm_config, served))
        self._remote_pools: dict[str, RemotePool] = {}
        self._told = Told({}, set())
        self._reading: dict[str, tuple[Ticket, Any]] = {}
        self._waiting: list[tuple[str, Any]] = []
        self._idle = False

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Register the pool beside the cache, and advertise it as one more region."""
        self._caches = {self.served.layers[slot_of(name)]: name for name in kv_caches}
        self._context = self.vllm_config.compilation_config.static_forward_context
        self._rows: dict[int, Rows] = {}
        for part in self._form(1).parts:
            name = self._caches[part.layer]
            attention, cache = self._context[name], kv_caches[name]
            rows = rows_of(attention, cache, part.heads)
            if self.served.stage == "prefill" or rows is not None:
                check_readable(attention, cache)
            if rows is not None and part.layer not in self._bias.by_layer:
                self._rows[part.layer] = rows
        host = self.nixl_memory_type == "DRAM"
        device = torch.device("cpu") if host else next(iter(kv_caches.values())).device
        self._staging = torch.zeros(self._pool.size, dtype=torch.uint8, device=device)
        region = (self._staging.data_ptr(), self._pool.size, max(0, self._staging.get_device()))
        descs = self.nixl_wrapper.get_reg_descs([(*region, "")], self.nixl_memory_type)
        # first: what follows exports the agent with the memory that it knows
        self.nixl_wrapper.register_memory(descs, backends=self.nixl_backends)
        self._registered_descs.append(descs)
        super().register_kv_caches(kv_caches)
        payload = self.xfer_handshake_metadata
        meta = msgspec.msgpack.decode(payload.agent_metadata_bytes, type=NixlAgentMetadata)
        _add_region(meta, *region[:2], self.nixl_memory_type)
        self.xfer_handshake_metadata = NixlHandshakePayload(
            compatibility_hash=payload.compatibility_hash,
            agent_metadata_bytes=msgspec.msgpack.encode(meta),
        )
        if self._staging.is_cuda:
            self._warm()

    def _warm(self) -> None:
        """Compile the codecs' kernels, for which the first prompt would wait: in the null page."""
        tokens = min(self.vllm_config.model_config.max_model_len, WARM_TOKENS)
        form, nonce, pages = self._form(tokens), bytes(NONCE_BYTES), [0] * tokens
        room = self._staging[: form.most]
        if self.served.stage == "prefill":
            form.write(room, nonce, self._kept(form, pages, tokens))
        else:
            shapes = ((2, part.heads, part.tokens, part.width) for part in form.parts)
            made = (torch.randn(shape, device=room.device) for shape in shapes)
            pairs = (x.to(part.dtype) for x, part in zip(made, form.parts, strict=True))
            size = form.write(room, nonce, (([(x[0], x[1])], None) for x in pairs))
            groups = [pages] * len(self.kv_cache_config.transfer_groups)
            self._decode(room[:size], nonce, tokens, groups)
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
            size = form.write(room, job.ticket.nonce, self._kept(form, job.pages, job.tokens))
            self._told.sizes[request] = {self.tp_rank: size}
        if metadata.pdtrim_to_encode and self._staging.is_cuda:
            stream = torch.cuda.current_stream(self._staging.device)
            self._told.written = stream.record_event()

    def _kept(self, form: Form, pages: list[int], tokens: int) -> Iterator[Batch]:
        """Keys and values of all parts, without their biases; the pages themselves if they can be.

        Args:
            tokens: of the prompt.
        """

        @cache
        def numbers_of(hole: tuple[int, int]) -> torch.Tensor:
            (here,) = self._kernel_pages(([*pages[: hole[0]], *pages[hole[1] :]],))
            return numbers(here, self._staging.device)

        @cache
        def at(hole: tuple[int, int], kept: int, page: int, step: int) -> torch.Tensor:
            return slots(numbers_of(hole), page, kept, step)

        for run in form.runs:
            if rows := self._rows_of(run):
                kv = [(row.k_GTD, row.v_GTD) for _, row in rows]
                at_YM = [at(p.hole, p.tokens, self._page_of(p), row.step) for p, row in rows]
                yield kv, _of_layers(at_YM, run[0].heads)
                continue
            for part in run:
                cache_of = self._cache_of(part.layer)
                k_GMD, v_GMD = gather(*cache_of, numbers_of(part.hole), part.tokens)
                biased = k_GMD[: part.heads], v_GMD[: part.heads]  # decode's first (widths.py)
                k_GMD, v_GMD = self._bias.taken_from(part, tokens - 1, biased)
                yield [(k_GMD, v_GMD)], None

    def _rows_of(self, parts: Sequence[Part]) -> list[tuple[Part, Rows]]:
        """Parts with their rows, if all have them."""
        rows = [(part, self._rows[part.layer]) for part in parts if part.layer in self._rows]
        return rows if len(rows) == len(parts) else []

    def _page_of(self, part: Part) -> int:
        return self._cache_of(part.layer)[1].shape[2]

    def take_told(self) -> Told | None:
        """What was encoded and refused since the last call."""
        told, self._told = self._told, Told({}, set())
        return told if told.sizes or told.refused else None

    def start_load_kv(self, metadata: Any) -> None:
        """Begin to read what was scheduled, those first that found no room before."""
        self._idle = metadata.pdtrim_idle
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
        nbytes, most = ticket.sizes[self.tp_rank], max(ticket.sizes)
        if ticket.offset + most > remote.size or most > self._pool.size:
            self._refuse(req_id, f"its range is not within prefill's pool of {remote.size} bytes")
            self._handle_failed_transfer(req_id, None, self._recv_failures)
        elif not self._pool.reserve(req_id, nbytes):
            self._waiting.append((req_id, meta))
        elif not self._spread(meta):
            self._pool.release(req_id)
            self._handle_failed_transfer(req_id, None, self._recv_failures)
        else:
            self._reading[req_id] = ticket, meta
            self._note_coded(meta.remote.num_tokens, nbytes)
            self._read(req_id, ticket, remote, meta.remote)

    def _note_coded(self, tokens: int, nbytes: int) -> None:
        size, ranks = self._page_tokens, self.world_size
        raw = bytes_sent(self.served.plan, tokens, size, self._itemsize, ranks)
        self.xfer_stats.note(SKIPPED_CODEC, max(0, raw - nbytes))

    def _read(self, request: str, ticket: Ticket, remote: RemotePool, source: Any) -> None:
        """Post one READ of this rank's whole range; vLLM polls it as one of its own."""
        nixl, handle = self.nixl_wrapper, None
        own = self._staged(request, ticket)
        local = (own.data_ptr(), len(own), max(0, own.get_device()))
        away = (remote.address + ticket.offset, len(own), remote.device)
        self._recving_transfers.setdefault(request, [])
        try:
            handle = nixl.initialize_xfer(
                "READ",
                nixl.get_xfer_descs([local], self.nixl_memory_type),
                nixl.get_xfer_descs([away], remote.memory),
                self._remote_agents[source.engine_id][(0, self.tp_rank)],
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

    def get_transfer_results(self) -> Any:
        """In a step that runs nothing, wait for a READ to end instead of for the next step."""
        if self._idle:
            self._await_read()
        return super().get_transfer_results()

    def _await_read(self) -> None:
        handles = [x for name in self._reading for x in self._recving_transfers.get(name, ())]
        end = time.perf_counter() + POLL_SECONDS
        try:
            while handles and time.perf_counter() < end:
                if any(self.nixl_wrapper.check_xfer_state(x) != "PROC" for x in handles):
                    return
        except Exception:  # of any kind: vLLM asks the same once more, and says what is wrong
            return

    def _staged(self, request: str, ticket: Ticket) -> torch.Tensor:
        return self._staging[self._pool.offset(request) :][: ticket.sizes[self.tp_rank]]

    def _arrived(self, results: Any) -> None:
        """Decode what came whole; refuse the rest."""
        for request in self._reading.keys() & results.finished_recving:
            ticket, meta = self._reading.pop(request)
            if request not in results.failed_recving:
                try:
                    staged, pages = self._staged(request, ticket), meta.local_physical_block_ids
                    self._decode(staged, ticket.nonce, meta.remote.num_tokens, pages)
                except WireError as error:
                    self._refuse(request, str(error))
                    results.failed_recving.add(request)
            self._pool.release(request)

    def _decode(
        self, staged: torch.Tensor, nonce: bytes, tokens: int, pages: Sequence[Sequence[int]]
    ) -> None:
        """Decode a range of a prompt of so many tokens into the kernel's pages of each group."""
        groups = self.kv_cache_config.transfer_group_index_by_layer

        @cache
        def at(group: int, page: int, tokens: int, step: int | None) -> torch.Tensor:
            # layers of one group have one rule, so one hole
            return slots(numbers(list(pages[group]), staged.device), page, tokens, step)

        def places(part: Part, step: int | None = None) -> torch.Tensor:
            group = groups[self._caches[part.layer]]
            return at(group, self._page_of(part), part.tokens, step)

        with together():  # pages of a request that is refused are never read
            for parts, data_YS in self._form(tokens).read(staged, nonce):
                if rows := self._rows_of(parts):
                    kv = [(row.k_GTD, row.v_GTD) for _, row in rows]
                    at_YM = [places(part, row.step) for part, row in rows]
                    kept_YGM = _of_layers(at_YM, parts[0].heads)
                    parts[0].codec.decode_layers(data_YS, kv, kept_YGM)
                    continue
                for part, data_S in zip(parts, data_YS, strict=True):
                    k_GMD, v_GMD = self._bias.added_to(part, tokens - 1, part.decode(data_S))
                    scatter(*self._cache_of(part.layer), places(part), k_GMD, v_GMD)
        if staged.is_cuda:  # no stream orders the next READ into this range
            torch.cuda.current_stream(staged.device).synchronize()

    def _refuse(self, request: str, problem: str) -> None:
        logger.error("request %s refused: %s", request, problem)
        self._told.refused.add(request)


def _of_layers(places: list[torch.Tensor], heads: int) -> torch.Tensor:
    """Rows ``[M]`` of each layer, for all of its heads ``[Y, G, M]``; no copy if they are one."""
    one = all(place is places[0] for place in places)
    at_YM = places[0].expand(len(places), -1) if one else torch.stack(places)
    return at_YM[:, None].expand(-1, heads, -1)


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
