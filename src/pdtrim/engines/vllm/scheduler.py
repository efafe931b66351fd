"""The scheduler's side: only prompts that are handed over may run.

Prefill's tokens mean nothing (its gates are closed to the last), so it must not answer anyone, and
decode's blocks are not made for prompts. A request outside of a handover is failed as vLLM fails a
load that went wrong, with status 500 and one line in the log; on decode the option ``count`` lets
it run on decode's own blocks, in full attention, and counts it. A prompt that was handed over and
is preempted comes back from the copy that the worker keeps (``preempted.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from pdtrim.engines.pages import pages_of
from pdtrim.engines.vllm.compat import NixlPullConnectorScheduler, forget_generations
from pdtrim.engines.vllm.metrics import LOCAL, REFUSED, Stats
from pdtrim.engines.vllm.preempted import Pages
from pdtrim.engines.vllm.stage import Served
from pdtrim.errors import PlanError

logger = logging.getLogger("vllm.pdtrim")

OPTIONS = ("refuse", "count")
WHERE = ("remote_engine_id", "remote_request_id", "remote_host", "remote_port", "tp_size")


def handover_problem(params: Any, prompt_tokens: int, block_size: int) -> str | None:
    """What is wrong with a request's ``kv_transfer_params`` on decode; None if nothing.

    They came over HTTP: sizes are checked before anything is read by them.
    """
    if not isinstance(params, dict) or not params.get("do_remote_prefill"):
        return "it comes without a handover: send it to the router"
    missing = [key for key in WHERE if params.get(key) is None]
    if missing:
        return f"its kv_transfer_params lack {missing[0]}"
    groups = params.get("remote_block_ids")
    if not isinstance(groups, Sequence) or len(groups) != 1 or not _are_ids(groups[0]):
        return "its remote_block_ids are not one list of page numbers"
    if params.get("remote_num_tokens") != prompt_tokens:
        return (
            f"prefill ran {params.get('remote_num_tokens')} tokens of a prompt of {prompt_tokens}"
        )
    if len(groups[0]) != pages_of(prompt_tokens, block_size):
        return f"a prompt of {prompt_tokens} tokens does not fill {len(groups[0])} pages"
    return None


def _is_addressed(params: dict[str, Any]) -> bool:
    return all(params.get(key) is not None for key in (*WHERE, "remote_block_ids"))


def _are_ids(values: Any) -> bool:
    return isinstance(values, Sequence) and all(type(v) is int and v >= 0 for v in values)


class Scheduler(NixlPullConnectorScheduler):
    """vLLM's, with a gate."""

    def __init__(
        self, vllm_config: Any, engine_id: str, kv_cache_config: Any, *, served: Served
    ) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        option = vllm_config.kv_transfer_config.get_from_extra_config("local_prefill", "refuse")
        if option not in OPTIONS:
            raise PlanError(f"local_prefill '{option}': use {' or '.join(OPTIONS)}")
        self._count_local = option == "count"
        self._stage = served.stage
        self._stats = Stats()
        self._local: set[str] = set()
        self._loaded: dict[str, Pages] = {}
        self._moved: dict[str, Pages] = {}
        self._to_restore: dict[str, Pages] = {}
        self._refused: dict[str, str] = {}
        self._to_fail: set[str] = set()

    def take_stats(self) -> Stats | None:
        """What was noted since the last call."""
        return None if self._stats.is_empty() else self._stats.clone_and_reset()

    def _problem(self, request: Any) -> str | None:
        params = request.kv_transfer_params
        if self._stage == "prefill":
            if isinstance(params, dict) and params.get("do_remote_decode"):
                return None
            return "this server only prefills: send it to the router"
        return handover_problem(params, request.num_prompt_tokens, self.block_size)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """As vLLM's for a handover; a refused request waits for a load that will fail."""
        if request.request_id in self._loaded:
            # asked again: it was preempted, or has one token, none of which is handed over
            tokens = request.num_prompt_tokens if request.num_prompt_tokens > 1 else 0
            missing = max(0, tokens - num_computed_tokens)
            return missing, missing > 0
        problem = self._problem(request)
        if problem is None:
            return super().get_num_new_matched_tokens(request, num_computed_tokens)
        params = request.kv_transfer_params
        local = not (isinstance(params, dict) and params.get("do_remote_prefill"))
        if self._stage == "decode" and local and self._count_local:
            self._local.add(request.request_id)
            return 0, False
        self._refused[request.request_id] = problem
        return request.num_prompt_tokens - num_computed_tokens, True

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Called when a request that was looked at is about to run."""
        problem = self._refused.pop(request.request_id, None)
        if problem is not None:
            logger.error("request %s refused: %s", request.request_id, problem)
            self._stats.note(REFUSED, 1)
            self._to_fail.add(request.request_id)
            return
        if request.request_id in self._local:
            if request.num_preemptions == 0:
                self._stats.note(LOCAL, 1)
        elif request.request_id in self._loaded:
            self._moved[request.request_id] = self._pages(request, blocks)
            if num_external_tokens > 0:
                new = self.get_exchange_clipped_blocks(blocks.get_unhashed_block_ids_all_groups())
                self._to_restore[request.request_id] = tuple(new)
            return
        elif self._stage == "decode":
            self._loaded[request.request_id] = self._pages(request, blocks)
        super().update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        """What the worker needs to know of this step."""
        meta = super().build_connector_meta(scheduler_output)
        forget_generations(meta)
        meta.pdtrim_to_fail, self._to_fail = self._to_fail, set()
        # in this order: a request may be preempted and come back within one step
        preempted = self._loaded.keys() & scheduler_output.preempted_req_ids
        meta.pdtrim_to_keep = {name: self._loaded[name] for name in preempted}
        self._loaded |= self._moved
        self._moved = {}
        meta.pdtrim_to_restore, self._to_restore = self._to_restore, {}
        meta.pdtrim_finished = scheduler_output.finished_req_ids
        return meta

    def _pages(self, request: Any, blocks: Any) -> Pages:
        """Of a request's blocks those that hold its prompt."""
        count = pages_of(request.num_prompt_tokens, self.block_size)
        pages = [
            [block.block_id for block in group[:count] if not block.is_null]
            for group in blocks.blocks
        ]
        return tuple(self.get_exchange_clipped_blocks(pages))

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        """Forget the request."""
        self._refused.pop(request.request_id, None)
        self._local.discard(request.request_id)
        self._loaded.pop(request.request_id, None)
        params = request.kv_transfer_params
        if self._stage == "decode" and isinstance(params, dict) and not _is_addressed(params):
            params["do_remote_prefill"] = False  # vLLM would look for prefill, to tell it
        return super().request_finished(request, block_ids)
