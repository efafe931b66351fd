"""The commands that serve an exported pair: vLLM servers for each stage, and a router before them.

Nothing is started here, and vLLM is not imported. The servers listen on loopback, since they trust
whoever speaks to them; only the router takes the host that the user gives.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from pdtrim.engines.base import Engine, Process
from pdtrim.engines.config import LOOPBACK, ServeConfig
from pdtrim.engines.pages import check_servable, padding, shares_prefixes
from pdtrim.engines.vllm.plugin import FAMILIES
from pdtrim.engines.vllm.room import room
from pdtrim.engines.vllm.stage import ROLE_OF
from pdtrim.errors import ModelError, PdtrimError, PlanError
from pdtrim.exported import read_pair
from pdtrim.models.checkpoint import check_files, read_stage
from pdtrim.plan import STAGES, PrunePlan, Stage
from pdtrim.runtime.nixl import READS_BY_COPY
from pdtrim.runtime.start import python_module

BLOCK_SIZE = 32  # of a plan that is exact to the token: what vLLM is fast with on CPU and GPU
PREFIX = "PDTrim"
UNSHARED = "--no-enable-prefix-caching"


def page_size(plan: PrunePlan, asked: int | None) -> int:
    """Tokens of a page: as asked, or the plan's; of a plan exact to the token, vLLM's own."""
    return asked or (plan.block_size if plan.block_size > 1 else BLOCK_SIZE)


def check_plan(plan: PrunePlan, block_size: int, ranks: int = 1) -> None:
    """Refuse a plan that vLLM cannot serve.

    Raises:
        PlanError: its rules do not fit pages, its KV heads not so many ranks, or its family is
            unknown.
    """
    check_servable(plan, block_size, ranks)
    if plan.model.family not in FAMILIES:
        raise PlanError(
            f"family '{plan.model.family}' is not served by vLLM yet, only {', '.join(FAMILIES)}:"
            " run the pair with 'pdtrim generate'"
        )


def processes(config: ServeConfig, *, free_port: Callable[[], int]) -> list[Process]:
    """What to start: the servers, then the router.

    Raises:
        ModelError: no such checkpoints.
        PlanError: the two come from different plans, or from one that vLLM cannot serve.
        PdtrimError: too few GPUs.
    """
    configs, plan = read_pair(config.pair)
    block_size = page_size(plan, config.block_size)
    check_plan(plan, block_size, config.tensor_parallel)
    if not shares_prefixes(plan) or config.local_prefill != "refuse":
        config = replace(config, decode_args=(UNSHARED, *config.decode_args))
    name = config.name or PurePosixPath(plan.model.name).name or plan.model.family
    ports = _distinct(free_port, config.port)
    replicas = {"prefill": config.prefill_replicas, "decode": config.decode_replicas}
    devices = iter(_devices(sum(replicas.values()), config.tensor_parallel))
    servers = [
        _server(config, stage, number, configs[stage], name, block_size, ports, next(devices))
        for stage in STAGES
        for number in range(replicas[stage])
    ]
    return [*servers, _router(config, servers, next(ports))]


def advice(config: ServeConfig) -> str | None:
    """What a plan could do better on vLLM, in a line; None if nothing."""
    _, plan = read_pair(config.pair)
    wasted = padding(plan)
    if not wasted:
        return None
    return (
        f"warning: vLLM pads {len(plan.sent_layers)} layers by {wasted}: trimmed and whole layers"
        " in numbers that divide one another waste no KV memory"
    )


def check_runnable(config: ServeConfig) -> None:
    """Raise PdtrimError if something is missing or altered here, or the router's port is taken.

    vLLM loads the checkpoints by itself, so their files are compared with their digests here, once.
    Another server on the port would answer in the router's place.
    """
    if find_spec("vllm") is None or find_router() is None:
        raise PdtrimError("vLLM or its router is not installed: pip install 'pdtrim[vllm]'")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise PdtrimError(
                f"cannot listen on {config.host}:{config.port} ({error.strerror}): give another"
                " --port or --host"
            ) from error
    for stage in STAGES:
        check_files(config.pair / stage, read_stage(config.pair / stage, stage).entry)


def find_router() -> str | None:
    """The router's executable: beside this Python, or on the path."""
    beside = Path(sys.executable).with_name("vllm-router")
    return str(beside) if os.access(beside, os.X_OK) else shutil.which("vllm-router")


def _distinct(free_port: Callable[[], int], *taken: int) -> Iterator[int]:
    """Ports, each once and none of ``taken``."""
    seen = set(taken)
    while True:
        port = free_port()
        if port not in seen:
            seen.add(port)
            yield port


def _devices(servers: int, each: int) -> list[dict[str, str]]:
    """The environment that gives each server GPUs of its own; nothing if the user has chosen."""
    import torch

    if "CUDA_VISIBLE_DEVICES" in os.environ or not torch.cuda.is_available():
        return [{}] * servers
    if torch.cuda.device_count() < servers * each:
        raise PdtrimError(
            f"{servers} servers need {'a GPU' if each == 1 else f'{each} GPUs'} each and there are"
            f" {torch.cuda.device_count()}: use fewer replicas, or set CUDA_VISIBLE_DEVICES to have"
            " all servers share what it names"
        )
    shares = (range(at, at + each) for at in range(0, servers * each, each))
    return [{"CUDA_VISIBLE_DEVICES": ",".join(map(str, numbers))} for numbers in shares]


def _server(
    config: ServeConfig,
    stage: Stage,
    number: int,
    data: dict[str, Any],
    name: str,
    block_size: int,
    ports: Iterator[int],
    device: dict[str, str],
) -> Process:
    folder = config.pair / stage
    port, side_port = next(ports), next(ports)
    command = [*python_module("vllm.entrypoints.openai.api_server")]
    command += ["--model", str(folder), "--served-model-name", name]
    command += ["--host", LOOPBACK, "--port", str(port), "--block-size", str(block_size)]
    command += ["--kv-transfer-config", json.dumps(_transfer(config, stage))]
    command += ["--hf-overrides", json.dumps({"architectures": [_architecture(data, folder)]})]
    if config.max_model_len is not None:
        command += ["--max-model-len", str(config.max_model_len)]
    if config.tensor_parallel > 1:
        command += ["--tensor-parallel-size", str(config.tensor_parallel)]
    command += config.prefill_args if stage == "prefill" else config.decode_args
    side_channel = {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": LOOPBACK,
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_port),
    }
    return Process(
        name=f"{stage} {number}",
        command=tuple(command),
        env={**side_channel, READS_BY_COPY: os.environ.get(READS_BY_COPY, "on"), **device},
        url=f"http://{LOOPBACK}:{port}",
    )


def _transfer(config: ServeConfig, stage: Stage) -> dict[str, Any]:
    extra: dict[str, Any] = {"local_prefill": config.local_prefill}
    if config.staged_prompts is not None:
        extra["staged_prompts"] = config.staged_prompts
    return {
        "kv_connector": "PDTrimConnector",
        "kv_connector_module_path": "pdtrim.engines.vllm.connector",
        "kv_role": ROLE_OF[stage],
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": extra,
    }


def _architecture(data: dict[str, Any], folder: Path) -> str:
    """pdtrim's class: a checkpoint of whole blocks names the plain one, which has no gates."""
    names = data.get("architectures")
    if not isinstance(names, list) or not names:
        raise ModelError(f"{folder}: its config names no architecture; export it again")
    return PREFIX + str(names[0]).removeprefix(PREFIX)


def _router(config: ServeConfig, servers: list[Process], metrics_port: int) -> Process:
    command = [find_router() or "vllm-router", "--vllm-pd-disaggregation"]
    for server in servers:
        command += [f"--{server.name.split()[0]}", server.url]
    command += ["--host", config.host, "--port", str(config.port)]
    # its default, cache_aware, has every prefill server tokenize every request
    command += ["--policy", "round_robin", "--prometheus-port", str(metrics_port)]
    host = LOOPBACK if config.host == "0.0.0.0" else config.host
    return Process(
        name="router", command=tuple(command), env={}, url=f"http://{host}:{config.port}"
    )


ENGINE = Engine(
    name="vllm",
    page_size=page_size,
    check_plan=check_plan,
    processes=processes,
    check_runnable=check_runnable,
    advice=advice,
    room=room,
)
"""vLLM, with its NIXL connector and its router."""
