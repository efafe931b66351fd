"""Real vLLM servers for the tests: started from pdtrim's own commands, ended with their groups."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

from pdtrim.engines.vllm.launch import Process, ServeConfig, free_port, processes

HOST = Path(__file__).parent / "vllm_host"
ENV = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or all servers share one core
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(HOST),
}
ARGS = ("--dtype", "float32", "--enforce-eager")
LEASE = 6  # seconds; vLLM's own default is 30


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
    """Wait for something that other processes bring about."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.2)


def commands(pair, **config):
    """pdtrim's own commands, with a short lease and room for one small host."""
    made = processes(
        ServeConfig(
            pair=pair,
            port=free_port(),
            max_model_len=1024,
            prefill_args=ARGS,
            decode_args=ARGS,
            **config,
        ),
        free_port=free_port,
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
            until(lambda server=server: _answers(server), seconds=400)
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
