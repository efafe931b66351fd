"""The tables of a run of ``serving.py``.

    python benchmarks/serving_table.py OUT

Requests of all repetitions of a point are taken together; in brackets is the least and the most of
the repetitions' own numbers. Goodput counts answers within both limits a second and a GPU.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from servers import quantile
from serving_systems import SYSTEMS

Row = dict[str, Any]
SLOS = ((0.6, 0.02), (0.4, 0.01))
"""Seconds to the first token, and for each further one."""


def goodput(rows: list[Row], slo: tuple[float, float]) -> float:
    """Answers within both limits, a second and a GPU."""
    good = sum(
        ttft <= slo[0] and tpot <= slo[1]
        for row in rows
        for ttft, tpot in zip(row["ttft_s"], row["tpot_s"], strict=True)
    )
    gpus = 2 if SYSTEMS[rows[0]["system"]].pd and len(rows[0]["gpus"]) > 1 else 1
    return good / sum(row["seconds"] for row in rows) / gpus


def spread(rows: list[Row], number: Callable[[list[Row]], float], form: str) -> str:
    """A number of all rows, and the least and the most of it in one."""
    each = sorted(number([row]) for row in rows)
    whole = format(number(rows), form)
    if len(rows) == 1:
        return whole
    return f"{whole} ({each[0]:{form}} to {each[-1]:{form}})"


def of(key: str, q: float, scale: float = 1e3) -> Callable[[list[Row]], float]:
    """A quantile of what every request has."""
    return lambda rows: scale * quantile([x for row in rows for x in row[key]], q)


def handover(key: str, scale: float) -> Callable[[list[Row]], float]:
    """The mean over repetitions of what a request's handover has."""
    return lambda rows: scale * sum(row["handover"].get(key, 0.0) for row in rows) / len(rows)


def whole(rows: list[Row]) -> float:
    """The median of answers' milliseconds from the request to the last token."""
    taken = [
        ttft + (row["answer"] - 1) * tpot
        for row in rows
        for ttft, tpot in zip(row["ttft_s"], row["tpot_s"], strict=True)
    ]
    return 1e3 * quantile(taken, 0.5)


def alone(system: str, prompt: int, rows: list[Row]) -> str:
    """A line: one request at a time."""
    cells = [
        f"{prompt:,}",
        system,
        spread(rows, of("ttft_s", 0.5), ".0f"),
        spread(rows, of("tpot_s", 0.5), ".2f"),
        f"{handover('bytes', 1e-6)(rows):,.0f} MB",
        f"{handover('descriptors', 1)(rows):,.0f}",
        spread(rows, handover("transfer_s", 1e3), ".1f"),
        spread(rows, handover("handover_s", 1e3), ".1f"),
        spread(rows, whole, ".0f"),
    ]
    return f"| {' | '.join(cells)} |"


def loaded(system: str, rate: float, rows: list[Row]) -> str:
    """A line: requests at a rate."""
    ttft = " / ".join(f"{of('ttft_s', q)(rows):.0f}" for q in (0.5, 0.9, 0.99))
    cells = [
        f"{rate:g}",
        system,
        ttft,
        spread(rows, of("tpot_s", 0.5), ".2f"),
        f"{1e3 * max(row['itl_s']['99'] for row in rows):.1f}",
        *(spread(rows, lambda some, slo=slo: goodput(some, slo), ".2f") for slo in SLOS),
        f"{max(row['decode_share']['most'] * row['decode_pages'] for row in rows):,.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Both tables."""
    points: dict[tuple[int, float, str], list[Row]] = defaultdict(list)
    for line in (Path(sys.argv[1]) / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt, _, rate = row["point"].partition("@")
        points[int(prompt), float(rate or 0), row["system"]].append(row)
    print(
        "| prompt | system | TTFT, ms | TPOT, ms | bytes | descriptors | wire, ms | handover, ms"
        " | whole answer, ms |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for (prompt, rate, system), rows in sorted(points.items()):
        if not rate:
            print(alone(system, prompt, rows))
    slos = " | ".join(f"goodput {1e3 * x:.0f}/{1e3 * y:.0f}" for x, y in SLOS)
    print(f"\n| requests/s | system | TTFT, ms | TPOT, ms | ITL p99, ms | {slos} | pages |")
    print("|---|---|---|---|---|---|---|---|")
    for (_, rate, system), rows in sorted(points.items()):
        if rate:
            print(loaded(system, rate, rows))


if __name__ == "__main__":
    main()
