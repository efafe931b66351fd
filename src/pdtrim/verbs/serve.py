"""Serve an exported pair: what ``pdtrim serve`` does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pdtrim.engines.config import ServeConfig


def serve_pair(
    config: ServeConfig,
    *,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
    log: Callable[[str, str], None] = lambda name, line: None,
    advise: Callable[[str], None] = lambda text: None,
) -> tuple[str, ...]:
    """Start vLLM's servers and a router, and hold them until a signal asks for an end.

    Args:
        dry_run: start nothing.
        say: takes what people wait for, such as the address.
        log: takes a process's name and a line that it wrote.
        advise: takes what the plan could do better on this engine.

    Returns:
        The shell lines of the processes.

    Raises:
        PdtrimError: a pair that vLLM cannot serve, or something that is missing on this machine.
        RuntimeFailure: a process ended, or did not answer in time.
    """
    from pdtrim.engines import engine_named
    from pdtrim.engines.supervise import serve
    from pdtrim.engines.vllm.launch import free_port

    engine = engine_named("vllm")
    started = engine.processes(config, free_port=free_port)
    if not dry_run:
        engine.check_runnable(config)
        if words := engine.advice(config):
            advise(words)
        serve(started, start_seconds=config.start_seconds, say=say, log=log)
    return tuple(process.shell for process in started)
