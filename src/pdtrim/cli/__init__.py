"""The ``pdtrim`` command: one verb, one function. A user's mistake is one line and exit code 2.

Verbs import what they run inside: ``pdtrim --help`` must not wait for torch.
"""

from __future__ import annotations

import typer
from rich.markup import escape

from pdtrim.cli import compare, make, measure, run, serve
from pdtrim.cli.common import err
from pdtrim.errors import PdtrimError

app = typer.Typer(
    name="pdtrim",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Prune a language model separately for prefill and for decode, and run the pair.",
)
for verbs in (make, run, serve, measure, compare):
    app.add_typer(verbs.app)


def main() -> None:
    """Entry point."""
    try:
        app(standalone_mode=True)
    except PdtrimError as error:
        text = escape(str(error).splitlines()[0])
        err.print(f"[red]error:[/] {text}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        err.print("stopped")
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise SystemExit(1) from None
