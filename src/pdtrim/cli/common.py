"""What the verbs share: options, printing, progress, the place for what they write.

A user's text (a prompt, a path, a model's name, an answer) is printed as it is: never as markup,
and never as control codes of the terminal, which are shown instead of obeyed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines; no progress bars.")]
Device = Annotated[str, typer.Option(help="cpu, or cuda.")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float32 or float16.")]
Seed = Annotated[int, typer.Option(help="Seed of all that is drawn.")]
ModelName = Annotated[str, typer.Argument(help="Hub id, folder, .gguf file, or 'smollm2'.")]
PlanFile = Annotated[Path, typer.Argument(help="The plan's file.")]
PlanOrPair = Annotated[Path, typer.Argument(help="A plan, or an exported pair's folder.")]
Source = Annotated[
    str | None, typer.Option(help="Where the dense model is, if not where the plan says.")
]
Folder = Annotated[Path, typer.Option("-o", "--output", help="Folder for all it makes.")]
KeptFolder = Annotated[Path, typer.Option("-o", "--output", help="Folder; what is there is kept.")]

CONTROLS = {
    *range(0x00, 0x09),
    *range(0x0B, 0x20),
    *range(0x7F, 0xA0),
    *range(0x2028, 0x202F),
    *range(0x2066, 0x206A),
    *range(0xD800, 0xE000),
}
"""Codes that move the cursor, colour, hide or turn text, and halves of characters; not line feed
and tab."""
SHOWN = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in CONTROLS}


def visible(text: str) -> str:
    """A text whose control codes are written out, such as ``\\x1b``."""
    return text.translate(SHOWN)


class _Visible:
    """A renderable whose text has no control codes but the console's own."""

    def __init__(self, renderable: ConsoleRenderable) -> None:
        self.renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for part in console.render(self.renderable, options):
            yield part if part.control else Segment(visible(part.text), part.style)


class _VisibleHook(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Visible(renderable) for renderable in renderables]


def console(*, stderr: bool = False) -> Console:
    """A console that takes no text for markup and obeys no control codes in it."""
    made = Console(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True)
    made.push_render_hook(_VisibleHook())
    return made


out = console()
err = console(stderr=True)


def progress_of(as_json: bool) -> Any:
    """A bar on a terminal, but for machines; elsewhere a line every half minute."""
    from pdtrim.progress import bar, lines, silent

    if not sys.stderr.isatty():
        return lines
    return silent if as_json else bar


def say_of(as_json: bool) -> Any:
    """A line to standard error for people."""

    def say(text: str) -> None:
        if not as_json:
            err.print(text)

    return say


def print_json(data: Any) -> None:
    """JSON on standard output, in ASCII."""
    print(json.dumps(data, indent=1, allow_nan=False))
