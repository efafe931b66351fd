"""Verbs that measure: eval, demo, kv-sweep, ablate, sensitivity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pdtrim.cli.common import (
    Device,
    Dtype,
    Folder,
    Json,
    KeptFolder,
    ModelName,
    PlanOrPair,
    Seed,
    Source,
    out,
    print_json,
    progress_of,
    say_of,
)
from pdtrim.cli.options import from_record
from pdtrim.evaluate.configs import AblationConfig, EvalConfig, SensitivityConfig, SweepConfig
from pdtrim.keep.folder import output_folder
from pdtrim.verbs.evaluate import evaluate_pair
from pdtrim.verbs.measure import measure_sensitivity, run_ablation, sweep_kv

app = typer.Typer()


@app.command(
    "eval",
    epilog="Example: pdtrim eval plan.json --text held_out.jsonl --limit 16"
    " | pdtrim eval plan.json --tasks piqa,arc_easy --data olmo --limit 100",
)
@from_record(EvalConfig)
def evaluate(
    pair: PlanOrPair,
    config: EvalConfig,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Also write result.json here."),
    ] = None,
    model: Source = None,
    device: Device = "cpu",
    dtype: Dtype = "bfloat16",
    as_json: Json = False,
) -> None:
    """Measure KL, NLL and perplexity of continuations, or benchmark tasks; dense beside it."""
    result = evaluate_pair(
        pair,
        config,
        output,
        model=model,
        dtype=dtype,
        device=device,
        progress=progress_of(as_json),
    )
    if as_json:
        print_json(result.to_json())
    else:
        _show(result)


def _show(result: Any) -> None:
    """A result of text or of tasks, and what decode retrieves if that was measured."""
    from pdtrim.evaluate.tasks.result import TasksResult, tasks_table
    from pdtrim.report.table import table

    if isinstance(result, TasksResult):
        out.print(tasks_table(result))
        return
    out.print(table(result))
    for row in result.rows:
        if row.metrics:
            out.print(f"{row.name}: " + ", ".join(f"{k} {v:.3f}" for k, v in row.metrics.items()))


@app.command(epilog="Example: pdtrim demo -o out/demo")
def demo(
    context: typer.Context,
    output: Folder,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Run the whole job on SmolLM2-135M-Instruct: plan, export, run, measure."""
    from pdtrim.demo import run_demo
    from pdtrim.report.table import table

    context.with_resource(output_folder(output, "demo"))
    result = run_demo(output, seed=seed, progress=progress_of(as_json), say=say_of(as_json))
    if as_json:
        print_json(result.to_json())
        return
    out.print(table(result))
    for row in result.rows:
        out.print(f"\n{row.name}  {row.settings}", style="bold")
        out.print(row.answer or "")
    out.print(f"\nwrote {output / 'result.json'}")


@app.command(epilog="Example: pdtrim kv-sweep smollm2 --text held_out.jsonl -o out/kv")
@from_record(SweepConfig)
def kv_sweep(
    model: ModelName,
    config: SweepConfig,
    output: Folder,
    device: Device = "cpu",
    dtype: Dtype = "bfloat16",
    as_json: Json = False,
) -> None:
    """Measure quality against bytes for all KV policies; write a table and a plot."""
    from pdtrim.report.table import table

    result = sweep_kv(
        model, config, output, dtype=dtype, device=device, progress=progress_of(as_json)
    )
    if as_json:
        print_json(result.to_json())
    else:
        out.print(table(result))
        for problem in result.problems:
            out.print(f"not to be trusted: {problem}", style="yellow")
        out.print(f"wrote {output}/result.json, table.md, kv.png and kv.svg")


@app.command(epilog="Example: pdtrim ablate smollm2 --text held_out.jsonl -o out/ablation")
@from_record(AblationConfig, again=("text", "prefill_remove", "only"))
def ablate(
    model: ModelName,
    config: AblationConfig,
    output: KeptFolder,
    device: Device = "cpu",
    dtype: Dtype = "bfloat16",
    as_json: Json = False,
) -> None:
    """Measure what each part of the method is worth; write result.json and a table."""
    made = run_ablation(
        model,
        config,
        output,
        dtype=dtype,
        device=device,
        progress=progress_of(as_json),
        say=say_of(as_json),
    )
    if as_json:
        print_json(made)
    else:
        out.print((output / "table.md").read_text(encoding="utf-8"))


@app.command(epilog="Example: pdtrim sensitivity smollm2 --text held_out.jsonl -o out/blocks")
@from_record(SensitivityConfig)
def sensitivity(
    model: ModelName,
    config: SensitivityConfig,
    output: Folder,
    device: Device = "cpu",
    dtype: Dtype = "bfloat16",
    as_json: Json = False,
) -> None:
    """Measure what losing each block alone costs each stage, in KL and recall, with heat maps."""
    from pdtrim.evaluate.sensitivity import WAYS
    from pdtrim.report.table import sensitivity_table

    maps = measure_sensitivity(
        model, config, output, dtype=dtype, device=device, progress=progress_of(as_json)
    )
    if as_json:
        rows = {
            what: dict(zip(WAYS, loss_WL.tolist(), strict=True)) for what, loss_WL in maps.items()
        }
        print_json({**rows["KL"], "recall": rows["recall"]})
    else:
        for what, loss_WL in maps.items():
            out.print(f"{what}:\n{sensitivity_table(loss_WL, tuple(WAYS))}")
        out.print(f"wrote table.md, blocks.png, recall.md and recall.png to {output}")
