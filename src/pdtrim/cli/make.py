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
    PlanFile,
    PlanOrPair,
    Source,
    err,
    out,
    print_json,
    progress_of,
    say_of,
)
from pdtrim.cli.options import from_record
from pdtrim.verbs.distill import TrainConfig, distill_plan
from pdtrim.verbs.export import export_pair
from pdtrim.verbs.plan import PlanConfig, make_plan

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
@from_record(TrainConfig, again=("text",))
def distill(
    plan_file: PlanFile,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write the new plan.")],
    config: TrainConfig,
    model: Source = None,
    device: Device = "cpu",
    dtype: Dtype = "bfloat16",
    as_json: Json = False,
) -> None:
    """Train decode's blocks or prefill's for what was removed; an interrupted training goes on."""
    made, trained = distill_plan(
        plan_file,
        config,
        output,
        model=model,
        dtype=dtype,
        device=device,
        progress=progress_of(as_json),
        say=say_of(as_json),
    )
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
    plan_file: PlanOrPair,
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
    plan_file: PlanFile,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the two stages.")],
    model: Source = None,
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
