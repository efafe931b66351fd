"""The verb compare: methods at one share of parameters removed, on tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pdtrim.cli.common import (
    Device,
    Dtype,
    Json,
    ModelName,
    out,
    print_json,
    progress_of,
    say_of,
)
from pdtrim.errors import PdtrimError
from pdtrim.verbs.compare import compare_methods

app = typer.Typer()

TASKS = "piqa,winogrande,hellaswag,boolq,arc_easy,arc_challenge,openbookqa"


@app.command(
    epilog="Example: pdtrim compare smollm2 --remove 0.2 --data hub --limit 500 -o out/compare"
)
def compare(
    model: ModelName,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder; what is there is kept.")],
    remove: Annotated[
        float, typer.Option(help="Share of the blocks' parameters, the mean of both stages.")
    ] = 0.2,
    methods: Annotated[str, typer.Option(help="all, none, or names with commas.")] = "all",
    tasks: Annotated[str, typer.Option(help="Names with commas; see docs/tasks.md.")] = TASKS,
    data: Annotated[str, typer.Option(help="Where the tasks' items are: a folder, hub, olmo.")] = (
        "hub"
    ),
    limit: Annotated[int | None, typer.Option(help="Items of each task; all if not given.")] = None,
    shots: Annotated[int | None, typer.Option(help="Worked examples in front of an item.")] = None,
    seeds: Annotated[
        str,
        typer.Option(
            "--seeds", "--seed", help="Seeds of calibration text and search, such as 0,1,2."
        ),
    ] = "0",
    calibration: Annotated[str, typer.Option(help="Text that steers the methods, or self.")] = (
        "self"
    ),
    sequences: Annotated[
        int, typer.Option(help="Calibration sequences that steer the methods.")
    ] = 32,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each calibration prompt.")] = 256,
    continuation_tokens: Annotated[
        int, typer.Option(help="Tokens of each calibration continuation.")
    ] = 256,
    row: Annotated[
        list[str], typer.Option(help="NAME=PLAN.json, a plan to measure too; again for more.")
    ] = [],  # noqa: B006
    latency: Annotated[bool, typer.Option(help="Time the two stages beside the dense ones.")] = (
        True
    ),
    batch_tokens: Annotated[
        int, typer.Option(help="Tokens of a task that run together; more is faster on a large GPU.")
    ] = 8192,
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
    from pdtrim.evaluate.compare.measure import CompareConfig
    from pdtrim.evaluate.compare.systems import chosen_methods
    from pdtrim.report.compare import table
    from pdtrim.stage.cost import Lengths

    try:
        numbers = tuple(int(seed) for seed in seeds.split(","))
    except ValueError:
        raise PdtrimError(f"--seeds '{seeds}': give numbers such as 0,1,2") from None
    config = CompareConfig(
        remove=remove,
        methods=chosen_methods(methods),
        tasks=tuple(task.strip() for task in tasks.split(",")),
        data=data,
        limit=limit,
        shots=shots,
        seeds=numbers,
        calibration=calibration,
        sequences=sequences,
        lengths=Lengths(prompt=prompt_tokens, continuation=continuation_tokens),
        rows=tuple(_named(text) for text in row),
        latency=latency,
        batch_tokens=batch_tokens,
    )
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


def _named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise PdtrimError(f"--row '{text}': give NAME=PLAN.json")
    return name, Path(path)
