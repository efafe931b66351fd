"""What ``serving.py`` serves: systems, their checkpoints without weights, and their commands."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from pdtrim.bench.removal import removing
from pdtrim.bench.shapes import shape_config
from pdtrim.bundle import TrimPlan
from pdtrim.engines.base import Process
from pdtrim.engines.config import ServeConfig
from pdtrim.engines.ports import free_port
from pdtrim.engines.vllm.launch import processes
from pdtrim.kv.codecs import parse_codec
from pdtrim.kv.selectors import FirstLast
from pdtrim.models.checkpoint import WEIGHTS, seal, write_stage_config
from pdtrim.models.model import Model
from pdtrim.plan import STAGES, Gates, LayerKV

NAME = "m"


@dataclass(frozen=True, kw_only=True)
class System:
    """What is served.

    Attributes:
        ours: pdtrim's connector; vLLM's own NIXL connector if not.
        pd: two stages; one server that does both if not.
        removed: share of prefill's blocks that only make keys and values.
        shorter: share of decode's blocks that are gone.
        codec: of every layer.
        trimmed: share of layers under ``first_last`` of 256 and 1,792 tokens.
        page: tokens of a page; None is the default of pdtrim, or of vLLM.
        tcp: decode reads over TCP on loopback, a slower link than NVLink.
    """

    ours: bool = True
    pd: bool = True
    removed: float = 0.0
    shorter: float = 0.0
    codec: str = "raw"
    trimmed: float = 0.0
    page: int | None = None
    tcp: bool = False


CODEC = "k3v2:rotate=true"
SYSTEMS = {
    "stock": System(ours=False),
    "stock128": System(ours=False, page=128),
    "pruned": System(removed=1 / 3),
    "coded": System(codec=CODEC),
    "both": System(removed=1 / 3, codec=CODEC),
    "shorter": System(removed=1 / 3, shorter=0.2, codec=CODEC),
    "trimmed": System(removed=1 / 3, codec=CODEC, trimmed=0.5),
    "dense": System(ours=False, pd=False),
    "stock128-tcp": System(ours=False, page=128, tcp=True),
    "pruned-tcp": System(removed=1 / 3, tcp=True),
    "both-tcp": System(removed=1 / 3, codec=CODEC, tcp=True),
}
TCP = {"UCX_TLS": "tcp,cuda_copy,self"}


def write_tokenizer(vocabulary: int, folder: Path) -> None:
    """A word a token, so that texts and token counts agree whatever the model says."""
    words = {f"w{i}": i for i in range(vocabulary)}
    raw = Tokenizer(models.WordLevel(words, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="w0").save_pretrained(folder)


def gates_of(system: System, layers: int) -> Gates:
    """What each stage runs; blocks that are removed lie evenly."""
    if not system.removed:
        return Gates.dense(layers).without_dead_work()
    gates, _ = removing(layers, round(system.removed * layers))
    if not system.shorter:
        return gates
    _, decode = removing(layers, round(system.shorter * layers))
    early = {i for i, on in enumerate(gates.prefill_mlp) if not on and i < gates.last_read}
    gone = {i for i, on in enumerate(decode.decode_mlp) if not on}
    return Gates.removing(layers, prefill=early, decode=gone).without_dead_work()


def write_pair(system: System, shape: str, folder: Path) -> None:
    """Both checkpoints of a system without their weights."""
    config = shape_config(shape)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = Model(network, name=shape)
    vars(model)["fingerprint"] = hashlib.sha256(shape.encode()).hexdigest()  # it has no weights
    layers = model.num_layers
    gates = gates_of(system, layers)
    codec = parse_codec(system.codec)
    rule = FirstLast(first=256, last=1792)
    cut = (
        {round(i / system.trimmed) for i in range(round(system.trimmed * layers))}
        if (system.trimmed)
        else set()
    )
    kv = tuple(
        LayerKV(selector=rule, codec=codec) if i in cut else LayerKV(codec=codec)
        for i in range(layers)
    )
    changes: dict[str, Any] = {"gates": gates, "kv": kv}
    if cut:
        changes["block_size"] = 32
    plan = TrimPlan.dense(model).plan.model_copy(update=changes)
    for stage in STAGES:
        write_tokenizer(config.vocab_size, folder / stage)
        save_file({}, folder / stage / WEIGHTS)
        write_stage_config(model, plan, stage, folder / stage)
    seal({stage: folder / stage for stage in STAGES})


def commands(
    system: System, folder: Path, port: Callable[[], int], options: argparse.Namespace
) -> list[Process]:
    """The processes of a system, the one that is asked last."""
    both = ("--load-format", "dummy", *options.stage_arg)
    config = ServeConfig(
        pair=folder,
        port=port(),
        name=NAME,
        max_model_len=options.max_model_len,
        prefill_args=(*both, *options.prefill_arg),
        decode_args=(*both, *options.decode_arg),
    )
    made = [uncached(process) for process in processes(config, free_port=port)]
    if system.tcp:
        made = [replace(process, env={**process.env, **TCP}) for process in made]
    if system.ours:
        return made
    servers = [stock(process, folder / "decode", system) for process in made[:2]]
    if system.pd:
        return [*servers, made[2]]
    return servers[1:]  # both stages are whole


def uncached(process: Process) -> Process:
    """Without a prefix cache: the load generator sends one of its prompts twice."""
    flag = "--no-enable-prefix-caching"
    if process.name == "router" or flag in process.command:
        return process
    return replace(process, command=(*process.command, flag))


def stock(process: Process, dense: Path, system: System) -> Process:
    """The same server as a user of plain vLLM starts it, with one model for both stages."""
    words = list(process.command)
    words[words.index("--model") + 1] = str(dense)
    for flag in ("--hf-overrides", "--block-size", "--kv-transfer-config"):
        at = words.index(flag)
        if flag != "--kv-transfer-config":
            del words[at : at + 2]
        elif system.pd:
            role = json.loads(words[at + 1])["kv_role"]
            words[at + 1] = json.dumps({"kv_connector": "NixlConnector", "kv_role": role})
        else:
            del words[at : at + 2]
    if system.page:
        words += ["--block-size", str(system.page)]
    return replace(process, command=tuple(words))


def distinct() -> Callable[[], int]:
    """Free ports, each given once: none of them is listened on before all are given."""
    given: set[int] = set()

    def port() -> int:
        while (found := free_port()) in given:
            pass
        given.add(found)
        return found

    return port
