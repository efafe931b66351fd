"""The verb that replays served requests."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from pdtrim.cli.common import Json, PlanOrPair, err, out, print_json, progress_of
from pdtrim.cli.options import from_record
from pdtrim.errors import PdtrimError
from pdtrim.verbs.watch import WatchConfig, watch_log, watch_requests

app = typer.Typer()


@app.command(
    epilog="Example: pdtrim watch pair requests.jsonl --once"
    " | pdtrim watch pair requests.jsonl --share 0.01 --port 9109"
)
@from_record(WatchConfig)
def watch(
    target: PlanOrPair,
    log: Annotated[Path, typer.Argument(help="Requests: JSON lines with a prompt, or vLLM's log.")],
    config: WatchConfig,
    once: Annotated[
        bool, typer.Option("--once", help="Replay what the log holds, print the hours, and end.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Replay a share of the served requests, dense and pruned: KL by the hour, and drift."""
    if not once:
        if as_json:
            raise PdtrimError("--json goes with --once: the metrics are served otherwise")
        watch_log(target, log, config, say=out.print, row=lambda hour: out.print(_line(hour)))
        return
    found = watch_requests(target, log, config, progress=progress_of(as_json))
    if as_json:
        print_json(found)
        return
    out.print(_table(found))
    skipped = {reason: count for reason, count in found["skipped"].items() if count}
    out.print(
        f"{found['replayed']:,} of {found['requests']:,} requests replayed"
        + "".join(f", {count:,} {reason}" for reason, count in skipped.items())
    )
    expected = found["expected"]
    if expected is not None:
        out.print(
            f"expected KL {expected['kl']:.4f} ({expected['sequences']} sequences of"
            f" {expected['source']}), borne up to {found['worse']:g} times"
        )
    (err if found["drift"] is None else out).print(found["said"], style="bold")


def _table(found: dict[str, Any]) -> Table:
    table = Table(title="by the hour, UTC", title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("hour", no_wrap=True)
    for name in ("requests", "KL", "agreement", "KV B/token", "p", "drift"):
        table.add_column(name, justify="right", no_wrap=True)
    for hour in found["hours"]:
        table.add_row(*_cells(hour).values())
    return table


def _cells(hour: dict[str, Any]) -> dict[str, str]:
    """What is shown of an hour."""
    size, p = hour["kv_bytes_per_token"], hour["p"]
    return {
        "hour": datetime.fromtimestamp(hour["start"], timezone.utc).strftime("%Y-%m-%d %H:00"),
        "requests": f"{hour['requests']:,}",
        "KL": f"{hour['kl']:.4f} ({hour['kl_error']:.4f})",
        "agreement": f"{hour['agreement']:.1%}",
        "KV bytes a token": "-" if size is None else f"{size:,.0f}",
        "p": "-" if p is None else f"{p:.4f}",
        "drift": {None: "untested", False: "no", True: "yes"}[hour["drift"]],
    }


def _line(hour: dict[str, Any]) -> str:
    return ", ".join(f"{name} {cell}" for name, cell in _cells(hour).items())
