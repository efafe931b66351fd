"""Verbs that make things: plan, inspect, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pdtrim.cli.common import (
    Device,
    Dtype,
    Json,
    ModelName,
    err,
    out,
    print_json,
    progress_of,
    say_of,
)
from pdtrim.cli.options import from_record
from pdtrim.errors import PdtrimError
from pdtrim.keep.files import sweep
from pdtrim.keep.folder import output_file
from pdtrim.verbs.export import export_pair
from pdtrim.verbs.plan import PlanConfig, make_plan
from pdtrim.words import Reading, Which

app = typer.Typer()


@app.command(
    epilog="Example: pdtrim plan smollm2 -o plan.json --prefill-remove 8 --decode-remove 0"
)
@from_record(PlanConfig)
def plan(
    model: ModelName,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write the plan.")],
    config: PlanConfig,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a search that was interrupted.")
    ] = False,
    device: Device = "cpu",
    dtype: Dtype = "bfloat16",
    as_json: Json = False,
) -> None:
    """Search which blocks each stage can lose, and write the plan."""
    from pdtrim.report.inspect import picture

    made = make_plan(
        model,
        config,
        output,
        resume=resume,
        dtype=dtype,
        device=device,
        progress=progress_of(as_json),
        say=err.print,
    )
    if as_json:
        about = made.plan.provenance.model_dump()
        print_json({"plan": str(output), "digest": made.plan.digest, **about})
    else:
        out.print(picture(made.plan, prompt_tokens=config.prompt_tokens))
        out.print(f"wrote {output}")


@app.command(
    epilog="Example: pdtrim distill plan.json -o trained.json --text text.jsonl --blocks all"
)
def distill(
    context: typer.Context,
    plan_file: Annotated[Path, typer.Argument(help="A plan.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write the new plan.")],
    text: Annotated[
        list[str],
        typer.Option(help="Training text: FILE, hub:NAME, or self; give it again for more."),
    ] = ["self"],  # noqa: B006
    blocks: Annotated[
        Which,
        typer.Option(help="Train merged pairs, the cuts' neighbours, or all decode blocks."),
    ] = "all",
    merge: Annotated[
        Reading | None,
        typer.Option(
            help="Removed blocks that merge with a neighbour first; pairs if --blocks pairs."
        ),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option()] = 256,
    continuation_tokens: Annotated[int, typer.Option()] = 256,
    sequences: Annotated[int, typer.Option(help="Of each training text, if it has them.")] = 256,
    held_out: Annotated[
        int, typer.Option(help="Of each, sequences that choose the best weights.")
    ] = 16,
    steps: Annotated[int, typer.Option()] = 1000,
    rows: Annotated[int, typer.Option(help="Sequences run together.")] = 4,
    accumulate: Annotated[int, typer.Option(help="Such groups a step.")] = 4,
    learning_rate: Annotated[float, typer.Option()] = 3e-4,
    minutes: Annotated[float | None, typer.Option(help="Of training at most.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Where the model is, if not where the plan says."),
    ] = None,
    seed: Annotated[int, typer.Option()] = 0,
    device: Device = "cpu",
    dtype: Dtype = "bfloat16",
    as_json: Json = False,
) -> None:
    """Train decode's kept blocks for what was removed; an interrupted training goes on."""
    from pdtrim.bundle import TrimPlan
    from pdtrim.calibration.batches import CalibrationConfig
    from pdtrim.calibration.mixture import load_mixture
    from pdtrim.distill.job import DistillConfig
    from pdtrim.distill.plan import Training, train_plan, trained_plan
    from pdtrim.distill.sets import SetRule
    from pdtrim.exported import base_model

    if output.resolve() == plan_file.resolve():
        raise PdtrimError("-o names the plan itself: give the trained one a name of its own")
    context.with_resource(output_file(output))
    progress, say = progress_of(as_json), say_of(as_json)
    loaded = TrimPlan.open(plan_file)
    dense = base_model(loaded.plan, source=model, dtype=dtype, device=device)
    data, rest = load_mixture(
        dense,
        text,
        CalibrationConfig(
            prompt_tokens=prompt_tokens,
            continuation_tokens=continuation_tokens,
            search=sequences,
            rerank=held_out,
            seed=seed,
        ),
        progress=progress,
        say=say,
    )
    checkpoint = output.with_name(f"{output.stem}.training.safetensors")
    sweep(checkpoint)
    if checkpoint.exists():
        say(f"going on from {checkpoint}")
    rule = SetRule(reading=merge or ("pairs" if blocks == "pairs" else "none"))
    config = DistillConfig(
        which=blocks,
        steps=steps,
        rows=rows,
        accumulate=accumulate,
        learning_rate=learning_rate,
        max_seconds=None if minutes is None else 60 * minutes,
        compute="float32" if dtype == "float32" else "bfloat16",
        seed=seed,
    )
    trained = train_plan(
        loaded,
        dense,
        data,
        rest,
        Training(rule=rule, distillation=config),
        checkpoint=checkpoint,
        progress=progress,
        say=say,
    )
    made = trained_plan(loaded.plan, trained).save(output)
    checkpoint.unlink(missing_ok=True)
    before, after = trained.distilled.held_out_before, trained.distilled.held_out_after
    if as_json:
        print_json(
            {
                "plan": str(output),
                "digest": made.plan.digest,
                "held_out_kl": {"before": before, "after": after},
                "merged": [merged.merged for merged in trained.merged],
            }
        )
    else:
        out.print(f"held-out KL {before:.4f} before, {after:.4f} after; wrote {output}")


@app.command(epilog="Example: pdtrim inspect plan.json")
def inspect(
    plan_file: Annotated[Path, typer.Argument(help="A plan, or an exported pair's folder.")],
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Prompt length for the bytes.")] = 512,
    as_json: Json = False,
) -> None:
    """Show which block runs where and what travels."""
    from pdtrim.bundle import TrimPlan
    from pdtrim.report.inspect import picture

    loaded = TrimPlan.open(plan_file).plan
    if as_json:
        print_json({"digest": loaded.digest, **loaded.to_json()})
    else:
        out.print(picture(loaded, prompt_tokens=prompt_tokens))


@app.command(epilog="Example: pdtrim export plan.json -o pair")
def export(
    plan_file: Annotated[Path, typer.Argument(help="A plan.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the two stages.")],
    model: Annotated[
        str | None,
        typer.Option(help="Where the model is, if not where the plan says."),
    ] = None,
    probe: Annotated[
        bool, typer.Option(help="Refuse KV codecs under which the model loses its needles.")
    ] = True,
    dtype: Dtype = "bfloat16",
    as_json: Json = False,
) -> None:
    """Write the prefill and the decode checkpoint."""
    from pdtrim.exported import plan_of

    export_pair(
        plan_file, output, model=model, probe=probe, dtype=dtype, progress=progress_of(as_json)
    )
    sizes = {
        stage: sum(f.stat().st_size for f in (output / stage).glob("*.safetensors"))
        for stage in ("prefill", "decode")
    }
    if as_json:
        print_json({"folder": str(output), "digest": plan_of(output).digest, "weight_bytes": sizes})
    else:
        for stage, size in sizes.items():
            out.print(f"{output / stage}: {size / 2**20:.1f} MiB of weights")
