"""The verb that shows what others left: report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pdtrim.cli.common import out
from pdtrim.cli.options import from_record
from pdtrim.verbs.report import ReportConfig, write_report

app = typer.Typer()


@app.command(
    epilog="Example: pdtrim report plan.json out/sensitivity out/kv roi.json -o report.html"
)
@from_record(ReportConfig)
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Plans, pairs, and what other verbs wrote: files or folders."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The HTML file to write.")],
    config: ReportConfig,
) -> None:
    """Write one page of HTML that needs no network: stages, quality, tasks, savings, sources."""
    out.print(f"wrote {write_report(runs, output, config)}")
