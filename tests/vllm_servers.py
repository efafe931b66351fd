"""Real vLLM servers for the tests: started from pdtrim's own commands, ended with their groups.

On a CPU they run eagerly in fp32. On a GPU they share it and run as they would for a user: bf16,
compiled, in CUDA graphs. The variable PDTRIM_TEST_VLLM_DTYPE names another type.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import pdtrim
from helpers import first_last, make_plan, tiny_model
from pdtrim.bundle import TrimPlan
from pdtrim.engines.base import Process
from pdtrim.engines.config import ServeConfig
from pdtrim.engines.ports import free_port
from pdtrim.engines.vllm.launch import processes
from pdtrim.kv.codecs import parse_codec
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.models.loading import load_model
from pdtrim.plan import STAGES, Gates, LayerKV
from pdtrim.stage.forward import Batch, forward

GPU = torch.cuda.is_available()
DTYPE = getattr(torch, os.environ.get("PDTRIM_TEST_VLLM_DTYPE", "bfloat16" if GPU else "float32"))
TYPE = str(DTYPE).removeprefix("torch.")
TIE = 1e-3
"""Nats by which a server's token may be behind the simulator's best in fp32."""

HOST = Path(__file__).parent / "vllm_host"
SOURCE = str(Path(pdtrim.__file__).parents[1])  # servers run the code that the tests import
ENV = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
if GPU:
    ENV |= {
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0"),
        "PYTHONPATH": os.pathsep.join((SOURCE, os.environ.get("PYTHONPATH", ""))),
    }
    ARGS: tuple[str, ...] = ("--dtype", TYPE, "--gpu-memory-utilization", "0.05")
    ARGS += ("--kv-cache-memory-bytes", "256M", "--max-num-seqs", "16")
else:
    ENV |= {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or all servers share one core
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "PYTHONPATH": os.pathsep.join((str(HOST), SOURCE, os.environ.get("PYTHONPATH", ""))),
    }
    ARGS = ("--dtype", TYPE, "--enforce-eager")
LEASE = 6  # seconds; vLLM's own default is 30

BLOCK = 32
RULE = first_last(20, 50)
GATES = Gates(
    prefill_attention=("full", "full", "full", "off", "full", "kv", "kv", "kv"),
    prefill_mlp=(True, False, True, True, True, False, True, False),
    decode_attention=(True, True, True, False, True, True, True, True),
    decode_mlp=(True, True, False, True, True, True, True, True),
)
"""Every kind of gate."""
LENGTHS = (1, 2, 31, 32, 33, 34, 64, 65, 82, 83, 84, 96, 97, 114, 115, 129, 300, 513)
"""Prompts at the edges of pages, and where the hole of RULE opens and grows."""


def tiny_pair(folder, tokenizer, kv, family="qwen3", *, widths=None, blocks=None, **changes):
    """A random model of eight blocks under GATES, exported; the model itself is in ``m``."""
    sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 96, "head_dim": 32}
    made = tiny_model(family, layers=8, **sizes | {"max_position_embeddings": 1024} | changes)
    made.network.save_pretrained(folder / "m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / "m")
    model = load_model(str(folder / "m"), dtype=TYPE)
    plan = make_plan(model, GATES, tuple(kv), block_size=BLOCK)
    plan = plan.model_copy(update={"widths": widths})
    return TrimPlan.of(plan, blocks or {}).export(model, folder / "pair")


def coded_rules():
    """Codecs of fixed and of varying length, two layers trimmed, one raw."""
    codecs = [parse_codec(name) for name in ("int4:group=32,recent=8", "entropy")]
    kv = [LayerKV(codec=codecs[layer % 2]) for layer in range(8)]
    for layer in (1, 4):
        kv[layer] = LayerKV(selector=RULE.selector, codec=codecs[layer % 2])
    kv[2] = LayerKV()
    return kv


def prompt_of(length, seed=0):
    generator = torch.Generator().manual_seed(seed * 1000 + length)
    return torch.randint(3, 64, (length,), generator=generator).tolist()


def agree(simulated, prompt, tokens, policy=None, tie=TIE):
    """Each token is the simulator's greedy one behind those before it, or about as likely.

    In bf16 a token may be further behind than ``tie``. An engine whose log-probabilities are off by
    so much as the simulator's own in bf16 are from those in fp32 takes a token that is behind by up
    to twice that: the best one and the taken one may move in opposite directions. How far the
    simulator's two runs lie apart is seen at the token itself and on average over the answer, and
    the larger counts. The token is held against both runs.
    """
    pair, plan = simulated
    batch = Batch(prompt_BP=torch.tensor([prompt]), continuation_BC=torch.tensor([tokens]))
    policy = policy or HandoverPolicy.of(plan)
    with torch.no_grad():
        runs = [forward(one, batch, plan.gates, policy)[0] for one in {pair, in_fp32(pair)}]
    made_RCV = torch.stack([logits_CV.float().log_softmax(-1) for logits_CV in runs])
    taken_RC1 = batch.continuation_BC[0][None, :, None].expand(len(runs), -1, -1)
    behind_C = (made_RCV.amax(-1) - made_RCV.gather(-1, taken_RC1)[..., 0]).amin(0)
    apart_C = (made_RCV.amax(0) - made_RCV.amin(0)).amax(-1)
    may_C = 2 * apart_C.maximum(apart_C.mean())
    return bool((behind_C < may_C.clamp(min=tie)).all())


@functools.lru_cache(maxsize=2)
def in_fp32(pair):
    """A pair with the same weights in fp32; the pair itself if it has that type."""
    if pair.decode.dtype == torch.float32:
        return pair
    made = copy.deepcopy(pair)
    for stage in STAGES:
        made.of(stage).network.float()
    return made


def tokens_of(answer):
    status, body = answer
    assert status == 200, body
    return body["choices"][0]["token_ids"]


def refill(simulated, source, decode, router, tie=TIE):
    """Requests that fit in decode's few pages at first, and do not when they have grown.

    Decode stands still until prefill has answered all three, so that they are there together.
    """
    before = decode.metric("pdtrim:handover_seconds_count")
    preempted = decode.metric("vllm:num_preemptions_total")
    prompts = [prompt_of(n, 3) for n in (300, 280, 260)]
    answered = source.metric("vllm:request_success_total") + len(prompts)
    with ThreadPoolExecutor(len(prompts)) as pool:
        with decode.stopped():
            asked = [pool.submit(post, router.url, completion(p, 200)) for p in prompts]
            until(lambda: source.metric("vllm:request_success_total") == answered)
        made = [answer.result() for answer in asked]
    assert decode.metric("vllm:num_preemptions_total") > preempted
    for prompt, answer in zip(prompts, made, strict=True):
        assert len(tokens_of(answer)) == 200
        assert agree(simulated, prompt, tokens_of(answer), tie=tie)
    assert decode.metric("pdtrim:refused_requests_total") == 0
    assert decode.metric("pdtrim:handover_seconds_count") == before + 3


def idle(*servers):
    """No request holds a page."""
    return all(server.used == 0 for server in servers)


@dataclass
class Server:
    """A server that answers."""

    process: Process
    popen: subprocess.Popen
    log: Path

    @property
    def url(self):
        return self.process.url

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()

    @contextlib.contextmanager
    def stopped(self):
        """Its processes stand still; what is sent meanwhile waits at its port."""
        os.killpg(self.popen.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self.popen.pid, signal.SIGCONT)

    def lines(self):
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            return answer.read().decode().splitlines()

    def metric(self, name, **labels):
        """Sum of a metric's samples with these labels."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        found = [
            float(line.rsplit(" ", 1)[1])
            for line in self.lines()
            if line.split("{")[0] == name and all(w in line for w in wanted)
        ]
        assert found, name
        return sum(found)

    @property
    def pages(self):
        """Pages of its KV cache."""
        (line,) = [x for x in self.lines() if x.startswith("vllm:cache_config_info{")]
        return int(line.split('num_gpu_blocks="')[1].split('"')[0])

    @property
    def used(self):
        """Share of the KV cache's pages that are taken."""
        return self.metric("vllm:kv_cache_usage_perc")

    def healthy(self):
        with urllib.request.urlopen(f"{self.url}/health", timeout=30) as answer:
            return answer.status == 200


def until(condition, seconds=90):
    """What other processes bring about, as soon as it is more than nothing."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.2)
    return found


def commands(pair, **config):
    """pdtrim's own commands, with a short lease and room for one small host."""
    usual = {"max_model_len": 1024, "prefill_args": ARGS, "decode_args": ARGS}
    made = processes(
        ServeConfig(pair=pair, port=free_port(), **(usual | config)), free_port=free_port
    )
    return [replace(p, command=_short_lease(p.command), env={**p.env, **ENV}) for p in made]


def _short_lease(command):
    words = list(command)
    if "--kv-transfer-config" in words:
        at = words.index("--kv-transfer-config") + 1
        settings = json.loads(words[at])
        settings["kv_connector_extra_config"]["kv_lease_duration"] = LEASE
        words[at] = json.dumps(settings)
    return tuple(words)


@contextlib.contextmanager
def running(started, folder):
    """Servers, each in a group of its own, that all answer."""
    servers = []
    try:
        for process in started:
            log = folder / f"{process.name.replace(' ', '-')}.log"
            with log.open("w") as out:
                popen = subprocess.Popen(
                    process.command,
                    env={**os.environ, **process.env},
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            servers.append(Server(process, popen, log))
        for server in servers:
            until(lambda server=server: _answers(server), seconds=600)
        yield servers
    finally:
        for server in servers:
            server.kill()


def _answers(server):
    assert server.popen.poll() is None, server.log.read_text()[-3000:]
    with contextlib.suppress(OSError):
        return server.healthy()
    return False


def post(url, body, *, path="/v1/completions", request_id=None, timeout=120):
    """(status, JSON) of one request."""
    headers = {"Content-Type": "application/json"}
    if request_id is not None:
        headers["X-Request-Id"] = request_id
    request = urllib.request.Request(url + path, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


def completion(prompt, tokens=8, **more):
    """A greedy request's body, by token ids."""
    return {
        "model": "m",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **more,
    }


def prefill(server, body):
    """What a router does first: (request id, decode's body)."""
    request_id = str(uuid.uuid4())
    ahead = {"do_remote_decode": True, "do_remote_prefill": False}
    status, made = post(
        server.url,
        {**body, "max_tokens": 1, "kv_transfer_params": ahead},
        request_id=request_id,
    )
    assert status == 200, made
    return request_id, {**body, "kv_transfer_params": made["kv_transfer_params"]}
