"""The verb compare: methods at one share of parameters removed, on tasks."""

from __future__ import annotations

from typing import Annotated

import typer

from pdtrim.cli.common import (
    Device,
    Dtype,
    Json,
    KeptFolder,
    ModelName,
    out,
    print_json,
    progress_of,
    say_of,
)
from pdtrim.cli.options import from_record
from pdtrim.evaluate.configs import CompareConfig
from pdtrim.verbs.compare import compare_methods

app = typer.Typer()


@app.command(
    epilog="Example: pdtrim compare smollm2 --remove 0.2 --data hub --limit 500 -o out/compare"
)
@from_record(
    CompareConfig, again=("rows",), names={"rows": ("--row",), "seeds": ("--seeds", "--seed")}
)
def compare(
    model: ModelName,
    output: KeptFolder,
    config: CompareConfig,
    only: Annotated[
        str | None,
        typer.Option(
            help="Measure these alone and write no table, for processes side by side: dense,"
            " names of systems, or NAME-seedN, with commas."
        ),
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "bfloat16",
    as_json: Json = False,
) -> None:
    """Compare methods at the same share removed; write result.json, table.md and compare.png."""
    from pdtrim.report.compare import table

    result = compare_methods(
        model,
        config,
        output,
        only=[name.strip() for name in only.split(",")] if only else (),
        dtype=dtype,
        device=device,
        progress=progress_of(as_json),
        say=say_of(as_json),
    )
    if result is None:
        return
    if as_json:
        print_json(result.to_json())
    else:
        out.print(table(result))
        out.print(f"wrote {output}: result.json, table.md and, with matplotlib, compare.png")
