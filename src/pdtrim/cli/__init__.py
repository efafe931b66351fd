"""The ``pdtrim`` command: one verb, one function. A user's mistake is one line and exit code 2.

Verbs import what they run inside: ``pdtrim --help`` must not wait for torch.
"""

from __future__ import annotations

import contextlib
import io
import sys
from typing import Any

import typer
from rich.text import Text

from pdtrim.cli import bench, compare, make, measure, report, run, serve, watch, worth
from pdtrim.cli.common import err
from pdtrim.errors import PdtrimError, one_line

UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""Typer's error for a wrong option, which it does not export."""

app = typer.Typer(
    name="pdtrim",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Prune a language model separately for prefill and for decode, and run the pair.",
)
for verbs in (make, run, serve, measure, compare, bench, worth, report, watch):
    app.add_typer(verbs.app)


def main() -> None:
    """Entry point: what a verb raises ends here, as one line."""
    _take_any_text()
    try:
        raise SystemExit(app(standalone_mode=False) or 0)
    except BrokenPipeError:
        _forget_output()
        raise SystemExit(1) from None
    except (PdtrimError, OSError, MemoryError) as error:
        _refuse(one_line(error))
    except UsageError as error:
        _refuse_usage(error)
    except (KeyboardInterrupt, typer.Abort):
        err.print("stopped")
        raise SystemExit(130) from None


def _refuse(text: str) -> None:
    err.print(Text.assemble(("error:", "red"), " ", text))
    raise SystemExit(2) from None


def _refuse_usage(error: Any) -> None:
    text = error.format_message()
    if not text:  # no verb was given, and the help is printed
        raise SystemExit(2) from None
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "pdtrim"
    _refuse(f"{text} (see '{path} --help')")


def _take_any_text() -> None:
    """Print what the terminal's encoding lacks as escapes, instead of failing on it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _forget_output() -> None:
    """Whoever read standard output is gone: what is left in its buffer has nowhere to go."""
    with contextlib.suppress(OSError):
        sys.stdout.close()
