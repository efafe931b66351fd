"""The verb that serves a pair on vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pdtrim.cli.common import err, out
from pdtrim.words import LocalPrefill

app = typer.Typer()


@app.command(epilog="Example: pdtrim serve pair --port 8000 --decode-replicas 2")
def serve(
    folder: Annotated[Path, typer.Argument(help="An exported pair.")],
    prefill_replicas: Annotated[int, typer.Option(help="Prefill servers.")] = 1,
    decode_replicas: Annotated[int, typer.Option(help="Decode servers.")] = 1,
    host: Annotated[str, typer.Option(help="Of the OpenAI endpoint.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Of the OpenAI endpoint.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="The model's name in requests; the plan's if not given.")
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(help="Tokens of a page; the plan's, or 32 if that is 1.")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of the longest request; the model's if not given.")
    ] = None,
    local_prefill: Annotated[
        LocalPrefill,
        typer.Option(help="A prompt that reaches decode without its KV: refuse, or run and count."),
    ] = "refuse",
    staged_prompts: Annotated[
        int | None,
        typer.Option(help="Longest prompts that wait coded for decode at once; 4 if not given."),
    ] = None,
    prefill_arg: Annotated[
        list[str], typer.Option(help="One more argument of vLLM for prefill; give it again.")
    ] = [],  # noqa: B006
    decode_arg: Annotated[
        list[str],
        typer.Option(help="One more for decode, as --decode-arg=--gpu-memory-utilization=0.8."),
    ] = [],  # noqa: B006
    start_seconds: Annotated[
        float, typer.Option(help="Seconds that the servers may take to start.")
    ] = 900,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands only.")] = False,
) -> None:
    """Serve a pair with vLLM behind a router, a GPU each server, until Ctrl-C."""
    from pdtrim.engines.vllm.launch import ServeConfig
    from pdtrim.verbs.serve import serve_pair

    config = ServeConfig(
        pair=folder,
        prefill_replicas=prefill_replicas,
        decode_replicas=decode_replicas,
        host=host,
        port=port,
        name=name,
        block_size=block_size,
        max_model_len=max_model_len,
        local_prefill=local_prefill,
        staged_prompts=staged_prompts,
        prefill_args=tuple(prefill_arg),
        decode_args=tuple(decode_arg),
        start_seconds=start_seconds,
    )
    lines = serve_pair(config, dry_run=dry_run, say=_say, log=_log, advise=err.print)
    if dry_run:
        for line in lines:
            print(line)
        return
    err.print("stopped")


def _say(text: str) -> None:
    out.print(text)


def _log(name: str, line: str) -> None:
    err.print(f"{name} | {line}")
