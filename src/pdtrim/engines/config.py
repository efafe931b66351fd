"""How to serve a pair. No torch here: the command's options are made of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pdtrim.errors import PdtrimError
from pdtrim.words import LocalPrefill

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """How to serve a pair.

    Attributes:
        pair: an exported pair's folder, which holds both stages.
        prefill_replicas: prefill servers.
        decode_replicas: decode servers.
        tensor_parallel: GPUs of each server, of both stages, which share the heads of every layer.
        host: where the OpenAI endpoint listens.
        port: the port of the OpenAI endpoint.
        name: the model's name in requests; the last part of the plan's if not given.
        block_size: tokens of an engine's page; the plan's if not given, or 32 if that is 1.
        max_model_len: tokens of the longest request; the model's if not given.
        local_prefill: what decode does with a prompt that did not come by handover, to refuse it,
            or to run it on its own blocks and count it.
        staged_prompts: the longest prompts that wait coded for decode at once; 4 if not given.
        prefill_args: one more argument of vLLM for the prefill servers.
        decode_args: one more for the decode servers, as --decode-arg=--gpu-memory-utilization=0.8.
        start_seconds: seconds that the servers may take to start.
        probe: whether to measure the link and the codecs before the servers start.

    Raises:
        PdtrimError: a value out of range.
    """

    pair: Path
    prefill_replicas: int = 1
    decode_replicas: int = 1
    tensor_parallel: int = 1
    host: str = LOOPBACK
    port: int = 8000
    name: str | None = None
    block_size: int | None = None
    max_model_len: int | None = None
    local_prefill: LocalPrefill = "refuse"
    staged_prompts: int | None = None
    prefill_args: tuple[str, ...] = ()
    decode_args: tuple[str, ...] = ()
    start_seconds: float = 900
    probe: bool = True

    def __post_init__(self) -> None:
        counts = ("prefill_replicas", "decode_replicas", "tensor_parallel", "block_size")
        for option in (*counts, "max_model_len", "staged_prompts"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise PdtrimError(f"{option} {value} must be at least 1")
        if not 1 <= self.port <= 65535:
            raise PdtrimError(f"port {self.port} must be 1 .. 65535")
        if not self.start_seconds > 0:
            raise PdtrimError(f"start_seconds {self.start_seconds} must be above 0")
        if self.local_prefill not in ("refuse", "count"):
            raise PdtrimError(f"local_prefill '{self.local_prefill}': use refuse or count")
