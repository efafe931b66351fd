"""The verb that serves a pair on vLLM."""

from __future__ import annotations

from typing import Annotated

import typer

from pdtrim.cli.common import err, out
from pdtrim.cli.options import from_record
from pdtrim.engines.config import ServeConfig
from pdtrim.verbs.serve import serve_pair

app = typer.Typer()


@app.command(epilog="Example: pdtrim serve pair --port 8000 --decode-replicas 2")
@from_record(
    ServeConfig,
    arguments=("pair",),
    again=("prefill_args", "decode_args"),
    names={"prefill_args": ("--prefill-arg",), "decode_args": ("--decode-arg",)},
)
def serve(
    config: ServeConfig,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands only.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print how each measured number came about.")
    ] = False,
) -> None:
    """Serve a pair with vLLM behind a router until Ctrl-C."""
    lines = serve_pair(
        config, dry_run=dry_run, explain=explain, say=_say, log=_log, advise=err.print
    )
    if dry_run:
        for line in lines:
            print(line)
        return
    err.print("stopped")


def _say(text: str) -> None:
    out.print(text)


def _log(name: str, line: str) -> None:
    err.print(f"{name} | {line}")
