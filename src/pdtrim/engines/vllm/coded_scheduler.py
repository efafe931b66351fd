"""The scheduler's side of a plan with codecs: ranges for prompts, tickets for clients."""

from __future__ import annotations

import secrets
from typing import Any

from pdtrim.engines.ranges import NONCE_BYTES, Pool, Ticket
from pdtrim.engines.vllm.coded import TICKET, Job, forms, ranks_of, staging_bytes
from pdtrim.engines.vllm.metrics import REFUSED
from pdtrim.engines.vllm.scheduler import Scheduler
from pdtrim.engines.vllm.stage import Served
from pdtrim.errors import WireError


class CodedScheduler(Scheduler):
    """Gives ranges on prefill, and takes tickets on decode."""

    def __init__(
        self, vllm_config: Any, engine_id: str, kv_cache_config: Any, *, served: Served
    ) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config, served=served)
        self._form = forms(vllm_config, served)
        self._ranks = ranks_of(vllm_config)
        self._pool = Pool(staging_bytes(vllm_config, served))
        self._prompts: dict[str, Any] = {}
        self._nonces: dict[str, bytes] = {}
        self._sizes: dict[str, dict[int, int]] = {}
        self._answers: dict[str, dict[str, Any]] = {}
        self._next: str | None = None
        self._unsound: set[str] = set()

    def _problem(self, request: Any) -> str | None:
        problem = super()._problem(request)
        if problem is None and self._stage == "decode":
            try:
                self._ticket(request)
            except WireError as error:
                return str(error)
        return problem

    def _ticket(self, request: Any) -> Ticket:
        form = self._form(request.num_prompt_tokens)
        return Ticket.from_json(request.kv_transfer_params.get(TICKET), form, self._ranks)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Prefill's prompts wait for a range."""
        prefills = self._stage == "prefill" and self._problem(request) is None
        if prefills and not self._reserve(request):
            return None, False
        return super().get_num_new_matched_tokens(request, num_computed_tokens)

    def _reserve(self, request: Any) -> bool:
        name = request.request_id
        if name in self._pool:  # preempted, or looked at twice
            return True
        # in turn, or short prompts would keep a long one out for ever
        if self._next not in (None, name):
            return False
        if not self._pool.reserve(name, self._form(request.num_prompt_tokens).most):
            self._next = name
            return False
        self._next = None
        self._prompts[name] = request
        self._nonces[name] = secrets.token_bytes(NONCE_BYTES)
        return True

    def _release(self, name: str) -> None:
        self._pool.release(name)
        for table in (self._prompts, self._nonces, self._sizes, self._answers):
            table.pop(name, None)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        """Tell the worker what to encode behind this step, and by which tickets to read."""
        tickets = {
            name: self._ticket(request)
            for name, (request, _, _, awaiting) in self._reqs_need_recv.items()
            if awaiting
        }
        meta = super().build_connector_meta(scheduler_output)
        meta.pdtrim_tickets = tickets
        meta.pdtrim_to_encode = {}
        meta.pdtrim_idle = not scheduler_output.num_scheduled_tokens
        for name, count in scheduler_output.num_scheduled_tokens.items():
            request = self._prompts.get(name)
            if request is None:
                continue
            tokens, before = request.num_prompt_tokens, request.num_computed_tokens
            if before < tokens <= before + count:
                (pages,) = scheduler_output.kv_connector_block_state.get_block_ids(name)
                ticket = Ticket(
                    offset=self._pool.offset(name),
                    sizes=(self._form(tokens).most,) * self._ranks,
                    nonce=self._nonces[name],
                )
                meta.pdtrim_to_encode[name] = Job(ticket=ticket, pages=[*pages], tokens=tokens)
        return meta

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        """Give the client its ticket, or drop the range of a request that will not be read."""
        delay, params = super().request_finished(request, block_ids)
        name = request.request_id
        if self._next == name:
            self._next = None
        if name in self._pool:
            if delay and params is not None:
                self._answers[name] = params
                self._sign(name)
            else:
                self._release(name)
        return delay, params

    def update_connector_output(self, connector_output: Any) -> None:
        """Learn what was encoded, and what was read or has expired."""
        super().update_connector_output(connector_output)
        told = connector_output.kv_connector_worker_meta
        if told is not None:
            told.wait()
        for name, sizes in told.sizes.items() if told is not None else ():
            if name in self._pool:
                self._sizes.setdefault(name, {}).update(sizes)
                self._sign(name)
        # once a request, however many ranks refused it
        self._unsound |= told.refused if told is not None else set()
        for name in self._unsound & (connector_output.finished_recving or set()):
            self._unsound.discard(name)
            self._stats.note(REFUSED, 1)
        for name in connector_output.finished_sending or ():
            self._release(name)

    def _sign(self, name: str) -> None:
        """Complete an answer whose lengths are known of all ranks.

        vLLM ends a request before it passes on what the worker said in the same step, but sends
        the answer, this very dict, only after both.
        """
        sizes = self._sizes.get(name, {})
        if len(sizes) == self._ranks and name in self._answers:
            self._answers.pop(name)[TICKET] = Ticket(
                offset=self._pool.offset(name),
                sizes=tuple(sizes[rank] for rank in range(self._ranks)),
                nonce=self._nonces[name],
            ).to_json()
