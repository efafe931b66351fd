"""Serve an exported pair: what ``pdtrim serve`` does."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pdtrim.engines.base import Engine, Process
    from pdtrim.engines.config import ServeConfig

PROBE_SECONDS = 300
INDENT = "    "


def serve_pair(
    config: ServeConfig,
    *,
    dry_run: bool = False,
    explain: bool = False,
    say: Callable[[str], None] = print,
    log: Callable[[str, str], None] = lambda name, line: None,
    advise: Callable[[str], None] = lambda text: None,
) -> tuple[str, ...]:
    """Start vLLM's servers and a router, and hold them until a signal asks for an end.

    Args:
        dry_run: start nothing.
        explain: advise how each number came about, too.
        say: takes what people wait for, such as the address.
        log: takes a process's name and a line that it wrote.
        advise: takes lines on what the plan saves on this machine, and on what could be better.

    Returns:
        The shell lines of the processes.

    Raises:
        PdtrimError: a pair that vLLM cannot serve, or something that is missing on this machine.
        RuntimeFailure: a process ended, or did not answer in time.
    """
    from pdtrim.engines import engine_named
    from pdtrim.engines.ports import free_port
    from pdtrim.engines.supervise import serve

    engine = engine_named("vllm")
    started = engine.processes(config, free_port=free_port)
    if not dry_run:
        engine.check_runnable(config)
        if config.probe:
            for line in _report(engine, config, started, explain=explain):
                advise(line)
        if words := engine.advice(config):
            advise(words)

        def answer(text: str) -> None:
            for process in started:
                if words := engine.room(config, process):
                    advise(words)
            say(text)

        serve(started, start_seconds=config.start_seconds, say=answer, log=log)
    return tuple(process.shell for process in started)


def _report(
    engine: Engine, config: ServeConfig, started: Sequence[Process], *, explain: bool
) -> list[str]:
    """What was measured, in lines; of a measurement that fails one line that says so."""
    from pdtrim.bench.start import SAYS, Measured
    from pdtrim.exported import longest_of, read_pair
    from pdtrim.report.start import start_lines
    from pdtrim.runtime.start import child_env, python_module

    configs, plan = read_pair(config.pair)
    settings = {
        "dtype": str(configs["decode"].get("dtype")),
        "block_size": engine.page_size(plan, config.block_size),
        "longest": config.max_model_len or longest_of(configs["decode"]),
        "ranks": config.tensor_parallel,
        "devices": _devices(started),
    }
    command = python_module("pdtrim.bench.start", str(config.pair), json.dumps(settings))
    env = {k: v for k, v in started[0].env.items() if k.startswith("UCX_")}
    try:
        done = subprocess.run(
            command, env=child_env(env), capture_output=True, text=True, timeout=PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return [f"nothing was measured: it took more than {PROBE_SECONDS} s"]
    said = [line for line in done.stdout.splitlines() if line.startswith(SAYS)]
    if not said:
        *_, last = ["it said nothing", *done.stderr.strip().splitlines()]
        return [f"nothing was measured: {last}"]
    measured = Measured.from_json(json.loads(said[0].removeprefix(SAYS)))
    lines = start_lines(plan, measured)
    return [
        text for line in lines for text in (line.text, *([INDENT + line.how] if explain else ()))
    ]


def _devices(started: Sequence[Process]) -> tuple[str, str]:
    """The first ones of the first prefill server and of the first decode server."""
    import torch

    if not torch.cuda.is_available():
        return "cpu", "cpu"
    prefill, decode = (
        next(process for process in started if process.name == f"{stage} 0")
        for stage in ("prefill", "decode")
    )
    numbers = (process.env.get("CUDA_VISIBLE_DEVICES", "0") for process in (prefill, decode))
    first, second = (f"cuda:{shared.split(',')[0]}" for shared in numbers)
    return first, second
