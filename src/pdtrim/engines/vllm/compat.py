"""Every name of vLLM that is not public, and the check that they are what pdtrim expects.

vLLM moves these between minor releases. The rest of the plugin imports them from here only; when a
release changes one, this is the file to read. ``check()`` runs when the plugin is loaded.

0.33 has all of these names of 0.32 where they were, and the arguments in ``SIGNATURES``. Of what it
adds one thing concerns pdtrim: prefill counts its registrations (:func:`forget_generations`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import (
    NixlBaseConnector,
    NixlPullConnector,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import (
    NIXL_CONNECTOR_VERSION,
    NixlAgentMetadata,
    NixlConnectorMetadata,
    NixlHandshakePayload,
    ReqMeta,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import (
    NixlPullConnectorScheduler,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import (
    NixlKVConnectorStats,
    NixlPromMetrics,
)
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import (
    LayerNameType,
    _encode_layer_name,
    direct_register_custom_op,
    kv_cache_dtype_str_to_dtype,
)
from vllm.v1.attention.backend import subclass_attention_backend
from vllm.v1.core.sched.output import KVConnectorBlockState
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, iter_layer_specs
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.metrics.utils import create_metric_per_engine

__all__ = [
    "NIXL_CONNECTOR_VERSION",
    "Attention",
    "AttentionSpec",
    "FullAttentionManager",
    "FullAttentionSpec",
    "KVCacheSpecRegistry",
    "KVConnectorBlockState",
    "KVConnectorRole",
    "KVConnectorTransferResults",
    "KVConnectorWorkerMetadata",
    "LayerNameType",
    "NixlAgentMetadata",
    "NixlBaseConnector",
    "NixlConnectorMetadata",
    "NixlHandshakePayload",
    "NixlKVConnectorStats",
    "NixlPromMetrics",
    "NixlPullConnector",
    "NixlPullConnectorScheduler",
    "NixlPullConnectorWorker",
    "ReqMeta",
    "_encode_layer_name",
    "check",
    "create_metric_per_engine",
    "direct_register_custom_op",
    "forget_generations",
    "iter_layer_specs",
    "kv_cache_dtype_str_to_dtype",
    "subclass_attention_backend",
]

TESTED = ("0.32", "0.33")
"""Minor versions that the tests have run on; how each, ``docs/serving.md`` says."""

SIGNATURES: dict[Callable[..., Any], tuple[str, ...]] = {
    NixlPullConnectorWorker.register_kv_caches: ("self", "kv_caches"),
    NixlPullConnectorWorker.add_remote_agent: (
        "self",
        "nixl_agent_meta",
        "remote_tp_rank",
        "remote_tp_size",
        "remote_dcp_size",
    ),
    NixlPullConnectorWorker._tracks_region_layers: ("self",),
    NixlPullConnectorWorker._requires_layer_name_routing: ("self",),
    NixlPullConnectorWorker._align_remote_regions_by_layer: ("self", "nixl_agent_meta"),
    NixlPullConnectorWorker._read_blocks_for_req: ("self", "req_id", "meta"),
    NixlPullConnectorWorker._handle_failed_transfer: (
        "self",
        "req_id",
        "handle",
        "failed_req_ids",
        "record_failed_transfer",
    ),
    NixlPullConnectorWorker.start_load_kv: ("self", "metadata"),
    NixlPullConnectorWorker.get_transfer_results: ("self",),
    NixlPullConnectorWorker._cleanup_remote_engine: ("self", "engine_id", "log_eviction"),
    NixlPullConnectorWorker._log_failure: (
        "self",
        "failure_type",
        "req_id",
        "msg",
        "error",
        "meta",
        "extra_context",
    ),
    NixlPullConnectorWorker._logical_to_kernel_block_ids: ("self", "block_ids", "ratio"),
    NixlPullConnectorScheduler.get_num_new_matched_tokens: (
        "self",
        "request",
        "num_computed_tokens",
    ),
    NixlPullConnectorScheduler.update_state_after_alloc: (
        "self",
        "request",
        "blocks",
        "num_external_tokens",
    ),
    NixlPullConnectorScheduler.build_connector_meta: ("self", "scheduler_output"),
    NixlPullConnectorScheduler.request_finished: ("self", "request", "block_ids"),
    NixlPullConnectorScheduler.update_connector_output: ("self", "connector_output"),
    NixlPullConnector.handle_preemptions: ("self", "kv_connector_metadata"),
    NixlPullConnector.wait_for_save: ("self",),
    NixlPullConnector.build_connector_worker_meta: ("self",),
    KVConnectorBlockState.get_block_ids: ("self", "req_id"),
    FullAttentionManager.allocate_external_computed_blocks: (
        "self",
        "request_id",
        "num_local_computed_tokens",
        "num_external_computed_tokens",
        "record_for_zeroing",
    ),
    FullAttentionManager.get_num_blocks_to_allocate: (
        "self",
        "request_id",
        "num_tokens",
        "new_computed_blocks",
        "total_computed_tokens",
        "num_local_computed_tokens",
        "num_tokens_main_model",
        "apply_admission_cap",
        "prefill_end",
    ),
    FullAttentionManager.cache_blocks: (
        "self",
        "request",
        "num_tokens",
        "retention_interval",
        "replay_boundaries",
    ),
    subclass_attention_backend: ("name_prefix", "attention_backend_cls", "builder_cls"),
}
"""What pdtrim overrides or calls, and the arguments it relies on."""


def check() -> None:
    """Raise RuntimeError in one line if this vLLM is not one that the plugin fits."""
    changed = [
        f"{function.__qualname__} has other arguments"
        for function, names in SIGNATURES.items()
        if tuple(inspect.signature(function).parameters) != names
    ]
    if ".".join(vllm.__version__.split(".")[:2]) not in TESTED:
        changed.append("it is not tested with it")
    if changed:
        raise RuntimeError(
            f"pdtrim does not fit vLLM {vllm.__version__}: {changed[0]};"
            f" install vLLM {' or '.join(TESTED)}"
        )


def forget_generations(metadata: NixlConnectorMetadata) -> None:
    """Read from prefill as it was at the handshake, whatever number a request gives (vLLM 0.33).

    There prefill counts how often it registered its cache, for after a sleep, and the number comes
    back in a request's ``kv_transfer_params``: at a greater one decode shakes hands again. pdtrim
    refuses sleep mode, and a client may write anything there.
    """
    for request in metadata.reqs_to_recv.values():
        request.remote.registration_generation = 0
