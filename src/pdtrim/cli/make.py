"""Verbs that make things: plan, inspect, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pdtrim.cli.common import (
    Device,
    Dtype,
    Json,
    ModelName,
    need_folder_place,
    out,
    print_json,
    progress_of,
    say_of,
)
from pdtrim.cli.work import Work
from pdtrim.errors import PdtrimError
from pdtrim.keep.files import sweep
from pdtrim.keep.folder import output_file
from pdtrim.words import Grain, Metric, Reading, Repair, Search, Which

app = typer.Typer()


def _count(text: str, blocks: int, option: str) -> int:
    """``8`` blocks or a share such as ``0.25`` of all."""
    try:
        number = float(text)
    except ValueError:
        raise PdtrimError(f"{option} '{text}': give a number of blocks or a share 0 .. 1") from None
    if 0 < number < 1:
        return round(number * blocks)
    if number < 0 or number != int(number):
        raise PdtrimError(f"{option} '{text}': give a whole number of blocks or a share 0 .. 1")
    return int(number)


def _removal(metric: str, prefill: str, decode: str, blocks: int) -> dict[str, Any]:
    """The target's counts, or its shares."""
    if metric == "blocks":
        return {
            "prefill_remove": _count(prefill, blocks, "--prefill-remove"),
            "decode_remove": _count(decode, blocks, "--decode-remove"),
        }
    try:
        return {"prefill_share": float(prefill), "decode_share": float(decode)}
    except ValueError:
        raise PdtrimError(
            f"with --metric {metric} give shares, not '{prefill}' and '{decode}'"
        ) from None


@app.command(
    epilog="Example: pdtrim plan smollm2 -o plan.json --prefill-remove 8 --decode-remove 0"
)
def plan(
    context: typer.Context,
    model: ModelName,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write the plan.")],
    method: Annotated[
        str, typer.Option(help="pdtrim, paper (as reconstructed), or a baseline.")
    ] = "pdtrim",
    mode: Annotated[
        str | None,
        typer.Option(help="projected, subset or unified; the method's own if not given."),
    ] = None,
    prefill_remove: Annotated[str, typer.Option(help="Blocks, or a share such as 0.25.")] = "0.25",
    decode_remove: Annotated[str, typer.Option(help="Blocks, or a share.")] = "0",
    metric: Annotated[
        Metric,
        typer.Option(help="What is removed: with all but blocks, both counts are shares."),
    ] = "blocks",
    grain: Annotated[
        Grain, typer.Option(help="block: whole blocks; part: attention and MLP apart.")
    ] = "block",
    search: Annotated[Search, typer.Option(help="How method pdtrim searches.")] = "hybrid",
    repair: Annotated[
        Repair | None,
        typer.Option(
            help="best: correct kept blocks for what was cut, in closed form; or none. The"
            " method's own if not given: best for pdtrim and its hybrids."
        ),
    ] = None,
    kv: Annotated[
        str,
        typer.Option(help="SELECTOR[:option=value,...][+CODEC], such as snapkv:share=0.5+int4."),
    ] = "full",
    kv_compression: Annotated[
        float | None,
        typer.Option(help="Instead of --kv: full bytes over bytes sent, mixed by measured KL."),
    ] = None,
    kv_bytes_per_token: Annotated[
        float | None,
        typer.Option(help="Instead of --kv: the same as bytes a prompt token."),
    ] = None,
    handover_ms: Annotated[
        float | None,
        typer.Option(help="Instead of --kv: time for a calibration prompt at --link-gbit-s."),
    ] = None,
    link_gbit_s: Annotated[
        float | None,
        typer.Option(help="Speed of the link; codecs that it outruns here are left out."),
    ] = None,
    calibration: Annotated[
        str, typer.Option(help="self, FILE.txt, FILE.jsonl[.gz], or hub:NAME[:SPLIT[:FIELD]].")
    ] = "self",
    prompt_tokens: Annotated[int, typer.Option(help="Prompt of a calibration sequence.")] = 256,
    continuation_tokens: Annotated[int, typer.Option(help="Its continuation.")] = 128,
    sequences: Annotated[int, typer.Option(help="Calibration sequences that steer it.")] = 12,
    fit_sequences: Annotated[
        int, typer.Option(help="More, that repairs are fitted to; 0: to those that steer.")
    ] = 24,
    budget: Annotated[
        int | None,
        typer.Option(help="Block-tokens the search may spend."),
    ] = None,
    block_size: Annotated[int, typer.Option(help="Tokens in a page of the decode engine.")] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a search that was interrupted.")
    ] = False,
    seed: Annotated[int, typer.Option()] = 0,
    device: Device = "cpu",
    dtype: Dtype = "bfloat16",
    as_json: Json = False,
) -> None:
    """Search which blocks each stage can lose, and write the plan."""
    from pdtrim.bench.codec import codec_speeds
    from pdtrim.calibration.batches import CalibrationConfig
    from pdtrim.methods import METHODS, Target
    from pdtrim.models.loading import load_model
    from pdtrim.report.inspect import picture
    from pdtrim.search.kv_menu import parse_budget
    from pdtrim.search.link import LinkBudget

    context.with_resource(output_file(output))
    if method not in METHODS:
        raise PdtrimError(f"unknown method '{method}': use one of {', '.join(METHODS)}")
    mode = mode or METHODS[method].default_mode
    if mode not in ("projected", "subset", "unified"):
        raise PdtrimError(f"unknown mode '{mode}': use projected, subset or unified")
    work = Work(output.with_name(f"{output.stem}.search"), resume=resume)
    parse_budget(kv)  # a typing mistake should not wait for the model
    text = CalibrationConfig(
        source=calibration,
        prompt_tokens=prompt_tokens,
        continuation_tokens=continuation_tokens,
        search=sequences,
        rerank=(sequences + 1) // 2,
        fit=fit_sequences if (repair or METHODS[method].default_repair) == "best" else 0,
        seed=seed,
    )
    progress = progress_of(as_json)
    with progress("loading the model", 1):
        dense = load_model(model, dtype=dtype, device=device)
    speeds = None
    if link_gbit_s is not None:
        with progress("timing the codecs", 1):
            speeds = codec_speeds(width=dense.head_dim, dtype=dtype, device=dense.device)
    kv = LinkBudget(
        compression=kv_compression,
        bytes_per_token=kv_bytes_per_token,
        handover_ms=handover_ms,
        link_gbit_s=link_gbit_s,
    ).policy(dense, kv, prompt_tokens, codec_gb_s=speeds)
    target = Target(
        **_removal(metric, prefill_remove, decode_remove, dense.num_layers),
        metric=metric,
        grain=grain,
        search=search,
        repair=repair,
        mode=mode,  # type: ignore[arg-type]
        kv=kv,
        seed=seed,
        block_size=block_size,
        budget=budget,
    )
    target.check(dense)
    with work:
        packed = work.text(dense, text, progress)
        made = (
            METHODS[method]()
            .plan(dense, packed, target, progress=progress, journal=work.journal)
            .save(output)
        )
    if as_json:
        about = made.plan.provenance.model_dump()
        print_json({"plan": str(output), "digest": made.plan.digest, **about})
    else:
        out.print(picture(made.plan, prompt_tokens=prompt_tokens))
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
    from pdtrim.bundle import TrimPlan
    from pdtrim.evaluate.kv_probe import check_codecs
    from pdtrim.exported import base_model

    need_folder_place(output)
    loaded = TrimPlan.open(plan_file)
    with progress_of(as_json)("exporting", 3) as advance:
        dense = base_model(loaded.plan, source=model, dtype=dtype)
        advance(1)
        if probe and dense.tokenizer is not None:
            check_codecs(dense, loaded.plan)
        advance(1)
        loaded.export(dense, output)
    sizes = {
        stage: sum(f.stat().st_size for f in (output / stage).glob("*.safetensors"))
        for stage in ("prefill", "decode")
    }
    if as_json:
        print_json({"folder": str(output), "digest": loaded.plan.digest, "weight_bytes": sizes})
    else:
        for stage, size in sizes.items():
            out.print(f"{output / stage}: {size / 2**20:.1f} MiB of weights")
