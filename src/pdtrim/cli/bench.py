"""Verbs that time: bench-codec, bench-forward, bench-transfer, bench-stages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pdtrim.cli.common import (
    ContinuationTokens,
    Dtype,
    Json,
    ModelName,
    PromptTokens,
    err,
    out,
    print_json,
    progress_of,
)
from pdtrim.keep.files import write_json, write_text
from pdtrim.keep.folder import output_folder

app = typer.Typer()

Place = Annotated[str, typer.Option(help="cpu or cuda.")]
Shape = Annotated[
    str,
    typer.Option(help="llama-3.1-8b, llama-2-13b, qwen2.5-7b, or a folder with a config.json."),
]
Output = Annotated[
    Path | None,
    typer.Option("-o", "--output", help="Folder for result.json and table.md."),
]
TRANSFER, STAGES = "handovers of a shape, timed", "stages of a shape, timed"


@app.command(epilog="Example: pdtrim bench-codec --codec int4 --codec k3v2:rotate=true")
def bench_codec(
    codec: Annotated[list[str], typer.Option(help="A codec to time; give it again for more.")] = [  # noqa: B006
        "int8",
        "int4",
        "k3v2:rotate=true",
        "int2:rotate=true",
        "fp8",
        "entropy",
        "lossless",
    ],
    heads: Annotated[int, typer.Option(help="KV heads, over all layers.")] = 90,
    tokens: Annotated[int, typer.Option(help="Tokens of each head.")] = 2048,
    width: Annotated[int, typer.Option(help="Channels of each head.")] = 64,
    device: Place = "cpu",
    dtype: Dtype = "bfloat16",
    repeats: Annotated[int, typer.Option(help="Runs of each; the median counts.")] = 5,
    torch_path: Annotated[
        bool, typer.Option("--torch-path", help="On a GPU too, not the kernels.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Time the codecs beside a plain copy, and say up to which link speed they pay."""
    from pdtrim.bench.codec import bench_codecs

    report = bench_codecs(
        codec,
        heads=heads,
        tokens=tokens,
        width=width,
        dtype=dtype,
        device=device,
        repeats=repeats,
        way="torch" if torch_path else None,
        progress=progress_of(as_json),
    )
    print_json(report)


@app.command(epilog="Example: pdtrim bench-forward smollm2 --prompt-tokens 512")
def bench_forward(
    model: ModelName,
    prompt_tokens: PromptTokens = 512,
    continuation_tokens: ContinuationTokens = 256,
    rows: Annotated[int, typer.Option(help="Sequences a batch.")] = 4,
    repeats: Annotated[int, typer.Option(help="Runs of each; the median counts.")] = 5,
    dtype: Dtype = "bfloat16",
    as_json: Json = False,
) -> None:
    """Time the simulator against transformers' forward, and prefix reuse by depth."""
    from pdtrim.bench.forward import bench_forward as bench
    from pdtrim.models.loading import load_model

    report = bench(
        load_model(model, dtype=dtype),
        prompt=prompt_tokens,
        continuation=continuation_tokens,
        rows=rows,
        repeats=repeats,
        progress=progress_of(as_json),
    )
    if as_json:
        print_json(report)
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


@app.command(
    epilog="Example: pdtrim bench-transfer --shape llama-3.1-8b --tokens 3824 --device cuda"
    " --link measured --link 100 -o out/transfer"
)
def bench_transfer(
    context: typer.Context,
    shape: Shape,
    tokens: Annotated[int, typer.Option(help="Tokens of the prompt that prefill runs.")] = 3824,
    link: Annotated[
        list[str],
        typer.Option(help="measured, or Gbit/s to pace moves by bytes; give it again for more."),
    ] = ["measured"],  # noqa: B006
    kv: Annotated[
        list[str] | None,
        typer.Option(help="KV policies that need no prompt, instead of a choice; again for more."),
    ] = None,
    device: Place = "cpu",
    to: Annotated[
        str | None,
        typer.Option(help="Receiving device; a second GPU where there is one, else the same."),
    ] = None,
    transport: Annotated[
        str, typer.Option(help="Of measured links: copy, or nixl into another process.")
    ] = "copy",
    dtype: Dtype = "bfloat16",
    repeats: Annotated[int, typer.Option(help="Rounds; medians count.")] = 5,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Time handovers of a model's shape beside a plain copy: encode, move, decode, exposed."""
    from pdtrim.bench.transfer import POLICIES
    from pdtrim.bench.transfer import bench_transfer as bench
    from pdtrim.report.bench import transfer_table

    _hold(context, output, TRANSFER)
    report = bench(
        shape,
        tokens=tokens,
        links=link,
        policies=kv or POLICIES,
        dtype=dtype,
        device=device,
        to=to,
        transport=transport,  # type: ignore[arg-type]
        repeats=repeats,
        progress=progress_of(as_json),
        say=err.print,
    )
    _finish(report, transfer_table(report), output, as_json)


@app.command(
    epilog="Example: pdtrim bench-stages --shape llama-3.1-8b --tokens 3824 --device cuda"
    " -o out/stages"
)
def bench_stages(
    context: typer.Context,
    shape: Shape,
    tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 3824,
    share: Annotated[
        list[float] | None,
        typer.Option(help="Of a stage's blocks to remove, instead of 1/4, 1/3, 1/2; again."),
    ] = None,
    device: Place = "cpu",
    dtype: Dtype = "bfloat16",
    repeats: Annotated[int, typer.Option(help="Rounds; medians count.")] = 5,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Time prefill and decode of a model's shape against the blocks that each loses."""
    from pdtrim.bench.removal import SHARES
    from pdtrim.bench.removal import bench_stages as bench
    from pdtrim.report.bench import stages_table

    _hold(context, output, STAGES)
    report = bench(
        shape,
        tokens=tokens,
        shares=share or SHARES,
        dtype=dtype,
        device=device,
        repeats=repeats,
        progress=progress_of(as_json),
    )
    _finish(report, stages_table(report), output, as_json)


def _hold(context: typer.Context, output: Path | None, what: str) -> None:
    """Find out before the work whether a folder can be written to."""
    if output is not None:
        context.with_resource(output_folder(output, what))


def _finish(report: dict[str, Any], table: str, output: Path | None, as_json: bool) -> None:
    if output is not None:
        write_text(output / "table.md", table)
        write_json(output / "result.json", report)
    if as_json:
        print_json(report)
    else:
        out.print(table)
