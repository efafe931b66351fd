"""Verbs that say what pruning is worth: roi and assess."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from pdtrim.cli.common import Json, PlanOrPair, out, print_json
from pdtrim.cli.options import from_record
from pdtrim.verbs.assess import AssessConfig
from pdtrim.verbs.assess import assess as assess_fleet
from pdtrim.verbs.roi import RoiConfig, estimate_roi

app = typer.Typer()

SHOWN = 4
"""Changes in the table; JSON has all."""
STAGES, CODECS, SIMULATED, FORMULA = "stage times", "codecs", "simulated", "formula"
ROWS = (
    ("prefill GPUs", "prefill_gpus", "{:,}", SIMULATED),
    ("decode GPUs", "decode_gpus", "{:,}", SIMULATED),
    ("prefill busy", "prefill_load", "{:.0%}", FORMULA),
    ("decode places taken", "decode_load", "{:.0%}", FORMULA),
    ("sequences a decode server", "batch", "{:.1f}", FORMULA),
    ("TTFT at the quantile, s", "ttft_quantile_s", "{:.3f}", SIMULATED),
    ("TTFT, mean, s", "ttft_s", "{:.3f}", SIMULATED),
    ("- in queues, s", "queue_s", "{:.3f}", SIMULATED),
    ("- in prefill, s", "prefill_s", "{:.3f}", STAGES),
    ("- outside the GPUs, s", "front_s", "{:.3f}", STAGES),
    ("- in the handover, s", "handover_s", "{:.4f}", CODECS),
    ("handover, MB a prompt", "handover_bytes", "MB", CODECS),
    ("TPOT, mean, s", "tpot_s", "{:.4f}", STAGES),
    ("KV in decode, GB a server", "decode_kv_bytes", "GB", FORMULA),
    ("requests a second a GPU", "goodput_per_gpu", "{:.2f}", SIMULATED),
    ("GPU hours a year", "gpu_hours_a_year", "{:,.0f}", FORMULA),
    ("money a year", "money_a_year", "{:,.0f}", FORMULA),
    ("energy, kWh a year", "kwh_a_year", "{:,.0f}", FORMULA),
)


@app.command(
    epilog="Example: pdtrim roi plan.json --system h100_sxm --isl 8000 --osl 200 --rate 50"
    " --ttft 0.6 --tpot 0.02 --link-gbit-s 100 --gpu-hour 2.5"
)
@from_record(RoiConfig)
def roi(
    pair: PlanOrPair,
    config: RoiConfig,
    as_json: Json = False,
) -> None:
    """Estimate GPUs and money a year, dense beside pruned, and what moves the saving."""
    found = estimate_roi(pair, config)
    if as_json:
        print_json(found)
        return
    out.print(_fleets(found))
    for name in ("dense", "pruned"):
        if not found[name]["reached"]:
            out.print(f"{name} misses its targets: {found[name]['reason']}")
    out.print(_saving(found["saving"]))
    out.print(_sensitivity(found["sensitivity"]))
    for name, source in found["sources"].items():
        out.print(f"{name}: {source}")


def _fleets(found: dict[str, Any]) -> Table:
    table = Table(title=f"{found['pair']} on {found['system']}", title_justify="left")
    table.add_column("")
    for name in ("dense", "pruned"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("source")
    for label, key, form, source in ROWS:
        cells = [_cell(found[name].get(key), form) for name in ("dense", "pruned")]
        if cells != ["-", "-"]:
            table.add_row(label, *cells, source)
    return table


def _cell(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    scale = {"MB": 1e6, "GB": 1e9}.get(form)
    return f"{value / scale:,.1f}" if scale else form.format(value)


def _saving(saving: dict[str, Any]) -> str:
    if saving["money_a_year"] is None:
        return "no saving can be said: see above"
    hours = saving["break_even_hours"]
    paid = "never" if hours is None else f"after {hours:,.1f} hours of serving"
    return (
        f"saves {saving['gpus']:,} GPUs and {saving['money_a_year']:,.0f} a year;"
        f" the work ({saving['work_cost']:,.2f}) is paid {paid}"
    )


def _sensitivity(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="saving a year with one input a quarter off", title_justify="left")
    for name in ("input", "value", "-25 %", "+25 %"):
        table.add_column(name, justify="left" if name == "input" else "right")
    for row in rows:
        ends = [
            f"{row[end]:,.0f}" if row[end] is not None else row[f"{end}_reason"]
            for end in ("low", "high")
        ]
        table.add_row(row["input"], f"{row['value']:g}", *ends)
    return table


@app.command(
    epilog="Example: pdtrim assess --metrics http://127.0.0.1:8100/metrics --metrics decode.prom"
    " | pdtrim assess --trace lengths.jsonl --stages llama-3.1-8b --tpot 0.02 --link-gbit-s 100"
)
@from_record(AssessConfig)
def assess(
    config: AssessConfig,
    metrics: Annotated[
        list[str],
        typer.Option(help="Prometheus text of a server, a file or loopback URL; one for each."),
    ] = [],  # noqa: B006
    trace: Annotated[
        str | None, typer.Option(help="JSONL of prompt_tokens and output_tokens, for no metrics.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say where a fleet's time goes and which plan to make, or not to prune."""
    found = assess_fleet(config, metrics=metrics, trace=trace)
    if as_json:
        print_json(found)
        return
    out.print(_parts(found))
    out.print(_levers(found["levers"]))
    for name, source in found["sources"].items():
        out.print(f"{name}: {source}")
    for lever in found["levers"][:SHOWN]:
        out.print(f"{lever['name']}: {lever['source']}")
    for line in found["advice"]:
        out.print(line, style="bold")


def _parts(found: dict[str, Any]) -> Table:
    table = Table(title="where a request's time goes", title_justify="left", box=None)
    for name in ("part", "seconds", "share"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for part in found["parts"]:
        cells = _cell(part["seconds"], "{:.4f}"), _cell(part["share"], "{:.0%}")
        table.add_row(part["part"], *cells)
    return table


def _levers(found: list[dict[str, Any]]) -> Table:
    table = Table(title="what could be saved at most", title_justify="left", box=None)
    table.add_column("change")
    for name in ("seconds", "of the request", "of GPU time", "of TTFT"):
        table.add_column(name, justify="right", no_wrap=True)
    for lever in found[:SHOWN]:
        shares = ("share_of_request", "share_of_gpu", "share_of_first")
        cells = [_cell(lever[name], "{:.1%}") for name in shares]
        table.add_row(lever["name"], f"{lever['saves_s']:.4f}", *cells)
    return table
