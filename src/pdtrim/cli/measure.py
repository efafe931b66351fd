"""Verbs that measure: eval, demo, kv-sweep, ablate, sensitivity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pdtrim.cli.common import (
    ContinuationTokens,
    Device,
    Dtype,
    Json,
    ModelName,
    PromptTokens,
    Seed,
    out,
    print_json,
    progress_of,
    say_of,
)
from pdtrim.errors import PdtrimError
from pdtrim.keep.folder import output_file, output_folder
from pdtrim.verbs.measure import run_ablation, sensitivity_maps, sweep_kv

app = typer.Typer()


@app.command(
    "eval",
    epilog="Example: pdtrim eval plan.json --text held_out.jsonl --limit 16"
    " | pdtrim eval plan.json --tasks piqa,arc_easy --data olmo --limit 100",
)
def evaluate(
    context: typer.Context,
    target: Annotated[Path, typer.Argument(help="A plan, or an exported pair's folder.")],
    text: Annotated[
        str | None, typer.Option(help="Held-out text: FILE.txt, FILE.jsonl or hub:NAME.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Benchmark tasks instead of text, such as piqa,arc_easy.")
    ] = None,
    data: Annotated[
        str, typer.Option(help="Where the tasks' rows are: a folder, olmo or hub.")
    ] = "hub",
    shots: Annotated[
        int | None, typer.Option(help="Solved examples in each prompt of a task.")
    ] = None,
    prompt_tokens: PromptTokens = 512,
    continuation_tokens: ContinuationTokens = 256,
    limit: Annotated[
        int | None, typer.Option(help="Sequences (16 if not given), or items of a task (all).")
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="kv: also what decode still retrieves from the prompt.")
    ] = None,
    probes: Annotated[int, typer.Option(help="Probes a task of the suite.")] = 20,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Also write result.json here."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Where the dense model is, if not where the plan says."),
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "bfloat16",
    as_json: Json = False,
) -> None:
    """Measure KL, NLL and perplexity of continuations, or benchmark tasks; dense beside it."""
    from pdtrim.evaluate.run import EvalConfig, evaluate_text
    from pdtrim.report.table import table

    if (text is None) == (tasks is None):
        raise PdtrimError("give one of --text and --tasks")
    if output is not None:
        context.with_resource(output_file(output))
    if text is None:
        _evaluate_tasks(
            target,
            [task.strip() for task in (tasks or "").split(",")],
            {"data": data, "limit": limit, "shots": shots},
            {"model": model, "dtype": dtype, "device": device},
            output,
            as_json,
        )
        return
    if suite not in (None, "kv"):
        raise PdtrimError(f"unknown suite '{suite}': use kv")
    config = EvalConfig(
        text=text,
        prompt_tokens=prompt_tokens,
        continuation_tokens=continuation_tokens,
        limit=16 if limit is None else limit,
        dtype=dtype,
        device=device,
        model=model,
        probes=probes if suite else 0,
    )
    result = evaluate_text(target, config, progress=progress_of(as_json))
    if output is not None:
        result.save(output)
    if as_json:
        print_json(result.to_json())
    else:
        out.print(table(result))
        for row in result.rows if suite else ():
            found = ", ".join(f"{k} {v:.3f}" for k, v in row.metrics.items())
            out.print(f"{row.name}: {found}")


def _evaluate_tasks(
    target: Path,
    tasks: list[str],
    rows: dict[str, Any],
    place: dict[str, Any],
    output: Path | None,
    as_json: bool,
) -> None:
    """``eval --tasks``; ``rows`` and ``place`` as TasksConfig and evaluate_tasks take them."""
    from pdtrim.evaluate.tasks.result import evaluate_tasks, tasks_table
    from pdtrim.evaluate.tasks.run import TasksConfig

    config = TasksConfig(**rows)
    result = evaluate_tasks(target, tasks, config, **place, progress=progress_of(as_json))
    if output is not None:
        result.save(output)
    if as_json:
        print_json(result.to_json())
    else:
        out.print(tasks_table(result))


@app.command(epilog="Example: pdtrim demo -o out/demo")
def demo(
    context: typer.Context,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for all it makes.")],
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
def kv_sweep(
    model: ModelName,
    text: Annotated[str, typer.Option(help="Held-out text: FILE.txt, FILE.jsonl or hub:NAME.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for all it makes.")],
    calibration: Annotated[
        str, typer.Option(help="Text of another source; self: the model writes it.")
    ] = "self",
    prompt_tokens: PromptTokens = 512,
    continuation_tokens: ContinuationTokens = 256,
    limit: Annotated[int, typer.Option(help="Held-out sequences, at most.")] = 8,
    probes: Annotated[int, typer.Option(help="Retrieval probes a task; 0 for none.")] = 10,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "bfloat16",
    as_json: Json = False,
) -> None:
    """Measure quality against bytes for all KV policies; write a table and a plot."""
    from pdtrim.evaluate.kv_sweep import SweepConfig
    from pdtrim.report.table import table
    from pdtrim.stage.cost import Lengths

    config = SweepConfig(
        text=text,
        calibration=calibration,
        lengths=Lengths(prompt=prompt_tokens, continuation=continuation_tokens),
        limit=limit,
        probes=probes,
        seed=seed,
    )
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
def ablate(
    model: ModelName,
    text: Annotated[list[str], typer.Option(help="Held-out text; give it again for more.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder; what is there is kept.")],
    calibration: Annotated[str, typer.Option(help="Text of another source, or self.")] = "self",
    prompt_tokens: PromptTokens = 256,
    continuation_tokens: ContinuationTokens = 256,
    sequences: Annotated[int, typer.Option(help="Sequences of calibration text.")] = 12,
    limit: Annotated[int, typer.Option(help="Sequences of each held-out text.")] = 16,
    budget: Annotated[float, typer.Option(help="What each search may cost, in dense passes.")] = 90,
    prefill_remove: Annotated[
        list[int], typer.Option(help="Blocks that prefill alone loses; give it again for more.")
    ] = [10, 12],  # noqa: B006
    unified_remove: Annotated[int, typer.Option(help="Blocks that both stages lose.")] = 6,
    decode_remove: Annotated[int, typer.Option(help="Blocks that decode alone loses.")] = 6,
    only: Annotated[
        list[str], typer.Option(help="Rows with these words, such as 'search, prefill'.")
    ] = [""],  # noqa: B006
    train_steps: Annotated[int, typer.Option(help="Steps of the paper's distillation.")] = 100,
    fit_sequences: Annotated[int, typer.Option(help="More sequences, to repair and train.")] = 64,
    seeds: Annotated[str, typer.Option(help="Seeds of text and search, with commas.")] = "0,1,2",
    device: Device = "cpu",
    dtype: Dtype = "bfloat16",
    as_json: Json = False,
) -> None:
    """Measure what each part of the method is worth; write result.json and a table."""
    from pdtrim.evaluate.ablation import AblationConfig
    from pdtrim.stage.cost import Lengths

    try:
        numbers = tuple(int(seed) for seed in seeds.split(","))
    except ValueError:
        raise PdtrimError(f"--seeds '{seeds}': give numbers such as 0,1,2") from None
    config = AblationConfig(
        texts=_named(text),
        calibration=calibration,
        seeds=numbers,
        lengths=Lengths(prompt=prompt_tokens, continuation=continuation_tokens),
        sequences=sequences,
        limit=limit,
        budget=budget,
        prefill=tuple(prefill_remove),
        unified=unified_remove,
        decode=decode_remove,
        only=tuple(only),
        train_steps=train_steps,
        fit=fit_sequences,
    )
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


def _named(sources: list[str]) -> dict[str, str]:
    """Texts by a short name: the folder and file of a path, without what they share."""
    names = [source.removesuffix(".gz").rsplit(".", 1)[0].split("/")[-2:] for source in sources]
    short = [" ".join(name) for name in names]
    if len(set(short)) < len(short):
        raise PdtrimError("two --text have the same name: rename one")
    return dict(zip(short, sources, strict=True))


@app.command(epilog="Example: pdtrim sensitivity smollm2 --text held_out.jsonl -o out/blocks")
def sensitivity(
    model: ModelName,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for all it makes.")],
    text: Annotated[str, typer.Option(help="FILE.txt, FILE.jsonl, hub:NAME, or self.")] = "self",
    prompt_tokens: PromptTokens = 256,
    continuation_tokens: ContinuationTokens = 256,
    sequences: Annotated[int, typer.Option(help="Sequences that are measured.")] = 8,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "bfloat16",
    as_json: Json = False,
) -> None:
    """Measure what losing each block alone costs each stage, in KL and recall, with heat maps."""
    from pdtrim.calibration.batches import CalibrationConfig
    from pdtrim.evaluate.sensitivity import WAYS
    from pdtrim.report.table import sensitivity_table

    config = CalibrationConfig(
        source=text,
        prompt_tokens=prompt_tokens,
        continuation_tokens=continuation_tokens,
        search=sequences,
        rerank=0,
        fit=0,
        seed=seed,
    )
    maps = sensitivity_maps(
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
