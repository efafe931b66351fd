"""Verbs that time: bench-codec, bench-forward, bench-transfer, bench-stages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pdtrim.bench.configs import CodecsConfig, ForwardConfig, StagesConfig, TransferConfig
from pdtrim.cli.common import Device, Dtype, Json, ModelName, err, out, print_json, progress_of
from pdtrim.cli.options import from_record
from pdtrim.keep.files import write_json, write_text
from pdtrim.keep.folder import output_folder

app = typer.Typer()

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
@from_record(CodecsConfig, again=("codecs",), names={"codecs": ("--codec",)})
def bench_codec(
    config: CodecsConfig,
    device: Device = "cpu",
    dtype: Dtype = "bfloat16",
    torch_path: Annotated[
        bool, typer.Option("--torch-path", help="On a GPU too, not the kernels.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Time the codecs beside a plain copy, and say up to which link speed they pay."""
    from pdtrim.bench.codec import bench_codecs

    way: Literal["torch"] | None = "torch" if torch_path else None
    print_json(
        bench_codecs(config, way=way, dtype=dtype, device=device, progress=progress_of(as_json))
    )


@app.command(epilog="Example: pdtrim bench-forward smollm2 --prompt-tokens 512")
@from_record(ForwardConfig)
def bench_forward(
    model: ModelName,
    config: ForwardConfig,
    device: Device = "cpu",
    dtype: Dtype = "bfloat16",
    as_json: Json = False,
) -> None:
    """Time the simulator against transformers' forward, and prefix reuse by depth."""
    from pdtrim.bench.forward import bench_forward as bench
    from pdtrim.models.loading import load_model

    loaded = load_model(model, dtype=dtype, device=device)
    report = bench(loaded, config, progress=progress_of(as_json))
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
@from_record(
    TransferConfig,
    again=("links", "policies"),
    names={"links": ("--link",), "policies": ("--kv",)},
)
def bench_transfer(
    context: typer.Context,
    shape: Shape,
    config: TransferConfig,
    device: Device = "cpu",
    dtype: Dtype = "bfloat16",
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Time handovers of a model's shape beside a plain copy: encode, move, decode, exposed."""
    from pdtrim.bench.transfer import bench_transfer as bench
    from pdtrim.report.bench import transfer_table

    _hold(context, output, TRANSFER)
    report = bench(
        shape,
        config,
        dtype=dtype,
        device=device,
        progress=progress_of(as_json),
        say=err.print,
    )
    _finish(report, transfer_table(report), output, as_json)


@app.command(
    epilog="Example: pdtrim bench-stages --shape llama-3.1-8b --tokens 3824 --device cuda"
    " -o out/stages"
)
@from_record(StagesConfig, again=("shares",), names={"shares": ("--share",)})
def bench_stages(
    context: typer.Context,
    shape: Shape,
    config: StagesConfig,
    device: Device = "cpu",
    dtype: Dtype = "bfloat16",
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Time prefill and decode of a model's shape against the blocks that each loses."""
    from pdtrim.bench.removal import bench_stages as bench
    from pdtrim.report.bench import stages_table

    _hold(context, output, STAGES)
    report = bench(shape, config, dtype=dtype, device=device, progress=progress_of(as_json))
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
