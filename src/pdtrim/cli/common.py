"""What the verbs share: options, consoles, progress."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

out = Console()
err = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines; no progress bars.")]
Device = Annotated[str, typer.Option(help="cpu, or cuda.")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float32 or float16.")]
ModelName = Annotated[str, typer.Argument(help="Hub id, folder, .gguf file, or 'smollm2'.")]


def progress_of(as_json: bool) -> Any:
    """A bar on a terminal; silence for machines."""
    from pdtrim.progress import bar, silent

    return silent if as_json or not sys.stderr.isatty() else bar


def say_of(as_json: bool) -> Any:
    """A line to standard error for people."""

    def say(text: str) -> None:
        if not as_json:
            err.print(text, highlight=False)

    return say


def print_json(data: Any) -> None:
    """JSON on standard output."""
    print(json.dumps(data, indent=1))
