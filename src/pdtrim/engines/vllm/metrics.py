"""pdtrim's counters beside those of vLLM's NIXL connector, on decode's ``/metrics``.

A worker or scheduler notes what happened in lists; vLLM carries them to the API server, which
counts.
"""

from __future__ import annotations

from typing import Any

from pdtrim.engines.pages import page_bytes
from pdtrim.engines.vllm.compat import (
    NixlKVConnectorStats,
    NixlPromMetrics,
    create_metric_per_engine,
    kv_cache_dtype_str_to_dtype,
)
from pdtrim.engines.vllm.stage import Served

SENT, SKIPPED_LAYER, SKIPPED_HEAD, SKIPPED_TOKEN, SKIPPED_CODEC, HANDOVER, LOCAL, REFUSED = (
    "pdtrim_bytes_sent",
    "pdtrim_bytes_skipped_layer",
    "pdtrim_bytes_skipped_head",
    "pdtrim_bytes_skipped_token",
    "pdtrim_bytes_skipped_codec",
    "pdtrim_handover_seconds",
    "pdtrim_local_prefills",
    "pdtrim_refused",
)
KEYS = (
    *(SENT, SKIPPED_LAYER, SKIPPED_HEAD, SKIPPED_TOKEN, SKIPPED_CODEC),
    *(HANDOVER, LOCAL, REFUSED),
)
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Stats(NixlKVConnectorStats):
    """What happened since the last look."""

    def reset(self) -> None:
        """Start over."""
        super().reset()
        self.data |= {key: [] for key in KEYS}

    def note(self, key: str, value: float) -> None:
        """Add one event."""
        self.data[key].append(value)

    def record_transfer(self, res: Any) -> None:
        """A finished NIXL transfer: its bytes crossed the wire."""
        super().record_transfer(res)
        if res is not None:
            self.note(SENT, res.totalBytes)

    def is_empty(self) -> bool:
        """Whether nothing happened."""
        return super().is_empty() and not any(self.data[key] for key in KEYS)


class Metrics(NixlPromMetrics):
    """The same, for Prometheus."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)

        def counter(name: str, words: str) -> dict[int, Any]:
            made = self._counter_cls(name=name, documentation=words, labelnames=labelnames)
            return dict(create_metric_per_engine(made, per_engine_labelvalues))

        skipped = self._counter_cls(
            name="pdtrim:kv_bytes_skipped",
            documentation="Bytes of prompt KV that the plan kept off the wire, by reason.",
            labelnames=[*labelnames, "reason"],
        )
        seconds = self._histogram_cls(
            name="pdtrim:handover_seconds",
            documentation="From the first sight of a handover to the last byte of its KV.",
            buckets=list(SECONDS),
            labelnames=labelnames,
        )
        self._counters: dict[str, dict[int, Any]] = {
            SENT: counter("pdtrim:kv_bytes_sent", "Bytes of prompt KV that crossed the wire."),
            LOCAL: counter(
                "pdtrim:local_prefill_requests",
                "Prompts that decode computed itself, with its own blocks.",
            ),
            REFUSED: counter(
                "pdtrim:refused_requests", "Requests refused for want of a sound handover."
            ),
        }
        for key, reason in (
            (SKIPPED_LAYER, "layer"),
            (SKIPPED_HEAD, "head"),
            (SKIPPED_TOKEN, "token"),
            (SKIPPED_CODEC, "codec"),
        ):
            self._counters[key] = {
                engine: skipped.labels(*values, reason)
                for engine, values in per_engine_labelvalues.items()
            }
        self._seconds = create_metric_per_engine(seconds, per_engine_labelvalues)
        size = self._gauge_cls(
            name="pdtrim:kv_bytes_per_token",
            documentation="Bytes that a token takes in decode's KV cache.",
            multiprocess_mode="mostrecent",
            labelnames=labelnames,
        )
        for gauge in create_metric_per_engine(size, per_engine_labelvalues).values():
            gauge.set(_bytes_per_token(vllm_config))

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Count what a worker or scheduler noted."""
        super().observe(transfer_stats_data, engine_idx)
        for key, metric in self._counters.items():
            for value in transfer_stats_data[key]:
                metric[engine_idx].inc(value)
        for value in transfer_stats_data[HANDOVER]:
            self._seconds[engine_idx].observe(value)


def _bytes_per_token(vllm_config: Any) -> int:
    """Of the layers that decode reads; pages that vLLM pads a cache with are not counted."""
    plan = Served.of(vllm_config.model_config.hf_config).plan
    itemsize = cache_itemsize(vllm_config)
    return sum(page_bytes(plan, layer, 1, itemsize) for layer in plan.sent_layers)


def cache_itemsize(vllm_config: Any) -> int:
    """Bytes of a number in the KV cache."""
    cache = vllm_config.cache_config.cache_dtype
    return int(kv_cache_dtype_str_to_dtype(cache, vllm_config.model_config).itemsize)
