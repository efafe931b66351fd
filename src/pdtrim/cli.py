"""The ``pdtrim`` command: one verb, one function. A user's mistake is one line and exit code 2."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pdtrim.errors import PdtrimError

# Verbs import what they run inside: `pdtrim --help` must not wait for torch.

app = typer.Typer(
    name="pdtrim",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Prune a language model separately for prefill and for decode, and run the pair.",
)
out = Console()
err = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines; no progress bars.")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float32 or float16.")]


def _progress(as_json: bool) -> Any:
    from pdtrim.progress import bar, silent

    return silent if as_json or not sys.stderr.isatty() else bar


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


@app.command(
    epilog="Example: pdtrim plan smollm2 -o plan.json --prefill-remove 8 --decode-remove 0"
)
def plan(
    model: Annotated[str, typer.Argument(help="Hub id, folder, .gguf file, or 'smollm2'.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write the plan.")],
    method: Annotated[str, typer.Option(help="pdtrim, or paper (as reconstructed).")] = "pdtrim",
    mode: Annotated[
        str | None,
        typer.Option(help="projected or subset; the method's own if not given."),
    ] = None,
    prefill_remove: Annotated[str, typer.Option(help="Blocks, or a share such as 0.25.")] = "0.25",
    decode_remove: Annotated[str, typer.Option(help="Blocks, or a share.")] = "0",
    kv: Annotated[
        str, typer.Option(help="full, or first_last[:first=4,last=60,layers=auto|all|N,cutoff=X].")
    ] = "full",
    calibration: Annotated[
        str, typer.Option(help="self, FILE.txt, FILE.jsonl[.gz], or hub:NAME[:SPLIT[:FIELD]].")
    ] = "self",
    prompt_tokens: Annotated[int, typer.Option(help="Prompt of a calibration sequence.")] = 256,
    continuation_tokens: Annotated[int, typer.Option(help="Its continuation.")] = 128,
    sequences: Annotated[int, typer.Option(help="Calibration sequences that steer it.")] = 12,
    budget: Annotated[
        int | None,
        typer.Option(help="Block-tokens the search may spend."),
    ] = None,
    block_size: Annotated[int, typer.Option(help="Tokens in a page of the decode engine.")] = 1,
    seed: Annotated[int, typer.Option()] = 0,
    dtype: Dtype = "bfloat16",
    as_json: Json = False,
) -> None:
    """Search which blocks each stage can lose, and write the plan."""
    from pdtrim.calibration.batches import CalibrationConfig, load_calibration
    from pdtrim.kv.request import KVRequest
    from pdtrim.methods import METHODS, Target
    from pdtrim.models.loading import load_model
    from pdtrim.report.inspect import picture

    if method not in METHODS:
        raise PdtrimError(f"unknown method '{method}': use one of {', '.join(METHODS)}")
    mode = mode or METHODS[method].default_mode
    if mode not in ("projected", "subset"):
        raise PdtrimError(f"unknown mode '{mode}': use projected or subset")
    KVRequest.parse(kv)  # a typing mistake should not wait for the model
    text = CalibrationConfig(
        source=calibration,
        prompt_tokens=prompt_tokens,
        continuation_tokens=continuation_tokens,
        search=sequences,
        rerank=(sequences + 1) // 2,
        report=0,
        seed=seed,
    )
    progress = _progress(as_json)
    with progress("loading the model", 1):
        dense = load_model(model, dtype=dtype)
    target = Target(
        prefill_remove=_count(prefill_remove, dense.num_layers, "--prefill-remove"),
        decode_remove=_count(decode_remove, dense.num_layers, "--decode-remove"),
        mode=mode,  # type: ignore[arg-type]
        kv=kv,
        seed=seed,
        block_size=block_size,
        budget=budget,
    )
    target.check(dense)
    packed = load_calibration(dense, text, progress=progress)
    made = METHODS[method]().plan(dense, packed, target, progress=progress)
    made.save(output)
    if as_json:
        _print_json({"plan": str(output), "digest": made.digest, **made.provenance.model_dump()})
    else:
        out.print(picture(made, prompt_tokens=prompt_tokens))
        out.print(f"wrote {output}")


@app.command(epilog="Example: pdtrim inspect plan.json")
def inspect(
    plan_file: Annotated[Path, typer.Argument(help="A plan, or an exported pair's folder.")],
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Prompt length for the bytes.")] = 512,
    as_json: Json = False,
) -> None:
    """Show which block runs where and what travels."""
    from pdtrim.plan import PrunePlan
    from pdtrim.report.inspect import picture
    from pdtrim.runtime.session import plan_of

    loaded = plan_of(plan_file) if plan_file.is_dir() else PrunePlan.load(plan_file)
    if as_json:
        _print_json({"digest": loaded.digest, **loaded.to_json()})
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
    dtype: Dtype = "bfloat16",
    as_json: Json = False,
) -> None:
    """Write the prefill and the decode checkpoint."""
    from pdtrim.export import base_model
    from pdtrim.export import export as write
    from pdtrim.plan import PrunePlan

    loaded = PrunePlan.load(plan_file)
    with _progress(as_json)("exporting", 2) as advance:
        dense = base_model(loaded, source=model, dtype=dtype)
        advance(1)
        write(loaded, dense, output)
    sizes = {
        stage: sum(f.stat().st_size for f in (output / stage).glob("*.safetensors"))
        for stage in ("prefill", "decode")
    }
    if as_json:
        _print_json({"folder": str(output), "digest": loaded.digest, "weight_bytes": sizes})
    else:
        for stage, size in sizes.items():
            out.print(f"{output / stage}: {size / 2**20:.1f} MiB of weights")


@app.command(epilog='Example: pdtrim generate pair --prompt "Explain what AI is." ')
def generate(
    folder: Annotated[Path, typer.Argument(help="An exported pair.")],
    prompt: Annotated[list[str], typer.Option(help="Give it again for a batch.")],
    max_new_tokens: Annotated[int, typer.Option()] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus.")] = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--raw", help="Use the chat template; by default if there is one."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Generate with the two processes; a single prompt streams."""
    from pdtrim.runtime.session import Session
    from pdtrim.stage.sampling import Sampling

    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    with Session(folder) as session:
        if len(prompt) == 1 and not as_json:
            _stream(session, session.encode(prompt[0], chat=chat), max_new_tokens, sampling)
        else:
            results = session.generate(
                prompt, max_new_tokens=max_new_tokens, sampling=sampling, chat=chat
            )
            if as_json:
                _print_json([vars(result) for result in results])
            else:
                for text, result in zip(prompt, results, strict=True):
                    out.print(f"[bold]{text}[/]", highlight=False)
                    out.print(result.text + "\n", markup=False, highlight=False)
        _say_timing(session, as_json)


def _stream(session: Any, tokens: list[int], max_new_tokens: int, sampling: Any) -> None:
    ids: list[int] = []
    shown = ""
    for _, token in session.stream([tokens], max_new_tokens=max_new_tokens, sampling=sampling):
        ids.append(token)
        text = session.tokenizer.decode(ids, skip_special_tokens=True)
        if not text.endswith("�"):  # half of a character: wait for the rest
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text
    sys.stdout.write("\n")


def _say_timing(session: Any, as_json: bool) -> None:
    if not as_json and session.timing is not None:
        t = session.timing
        err.print(
            f"[dim]prefill {t.prefill_s:.2f} s, handover {sum(session.kv_bytes):,} bytes in"
            f" {t.handover_s * 1000:.1f} ms, decode {t.decode_s:.2f} s with"
            f" {t.cache_bytes / 2**20:.1f} MiB of KV cache[/]"
        )


@app.command(
    "eval",
    epilog="Example: pdtrim eval plan.json --text held_out.jsonl --limit 16",
)
def evaluate(
    target: Annotated[Path, typer.Argument(help="A plan, or an exported pair's folder.")],
    text: Annotated[str, typer.Option(help="Held-out text: FILE.txt, FILE.jsonl or hub:NAME.")],
    prompt_tokens: Annotated[int, typer.Option()] = 512,
    continuation_tokens: Annotated[int, typer.Option()] = 256,
    limit: Annotated[int, typer.Option(help="Sequences at most.")] = 16,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Also write result.json here."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Where the dense model is, if not where the plan says."),
    ] = None,
    dtype: Dtype = "bfloat16",
    as_json: Json = False,
) -> None:
    """Measure KL, NLL and perplexity of continuations, dense beside it."""
    from pdtrim.evaluate.run import EvalConfig
    from pdtrim.evaluate.run import evaluate as run
    from pdtrim.report.table import table

    config = EvalConfig(
        text=text,
        prompt_tokens=prompt_tokens,
        continuation_tokens=continuation_tokens,
        limit=limit,
        dtype=dtype,
        model=model,
    )
    result = run(target, config, progress=_progress(as_json))
    if output is not None:
        result.save(output)
    if as_json:
        _print_json(result.to_json())
    else:
        out.print(table(result))


@app.command(epilog="Example: pdtrim demo -o out/demo")
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for all it makes.")],
    seed: Annotated[int, typer.Option()] = 0,
    as_json: Json = False,
) -> None:
    """Run the whole job on SmolLM2-135M-Instruct: plan, export, run, measure."""
    from pdtrim.demo import run_demo
    from pdtrim.report.table import table

    result = run_demo(output, seed=seed, progress=_progress(as_json), say=_say(as_json))
    if as_json:
        _print_json(result.to_json())
        return
    out.print(table(result))
    for row in result.rows:
        out.print(f"\n[bold]{row.name}[/]  {row.settings}", highlight=False)
        out.print(row.answer or "", markup=False, highlight=False)
    out.print(f"\nwrote {output / 'result.json'}")


@app.command(epilog="Example: pdtrim bench-forward smollm2 --prompt-tokens 512")
def bench_forward(
    model: Annotated[str, typer.Argument(help="Hub id, folder, .gguf file, or 'smollm2'.")],
    prompt_tokens: Annotated[int, typer.Option()] = 512,
    continuation_tokens: Annotated[int, typer.Option()] = 256,
    rows: Annotated[int, typer.Option(help="Sequences a batch.")] = 4,
    repeats: Annotated[int, typer.Option(help="Runs of each; the median counts.")] = 5,
    dtype: Dtype = "bfloat16",
    as_json: Json = False,
) -> None:
    """Time the simulator against transformers' forward, and prefix reuse by depth."""
    from pdtrim.bench.forward import bench
    from pdtrim.models.loading import load_model

    report = bench(
        load_model(model, dtype=dtype),
        prompt=prompt_tokens,
        continuation=continuation_tokens,
        rows=rows,
        repeats=repeats,
        progress=_progress(as_json),
    )
    if as_json:
        _print_json(report)
        return
    out.print(
        f"transformers {report['transformers_tokens_s']:.0f} tokens/s, simulator"
        f" {report['simulator_tokens_s']:.0f}: ratio {report['ratio']:.2f}"
    )
    for entry in report["reuse"]:
        out.print(
            f"resume at block {entry['start']:>3}: {entry['time_share']:.2f} of the full time,"
            f" {entry['block_share']:.2f} of the blocks"
        )


def _say(as_json: bool) -> Any:
    def say(text: str) -> None:
        if not as_json:
            err.print(text, highlight=False)

    return say


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=1))


def main() -> None:
    """Entry point."""
    try:
        app(standalone_mode=True)
    except PdtrimError as error:
        err.print(f"[red]error:[/] {str(error).splitlines()[0]}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        err.print("stopped")
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
