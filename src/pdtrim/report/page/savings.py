"""What ``pdtrim roi --json`` found, ready to be recomputed in the page.

GPUs come from a simulation of arrivals, which no formula replaces: the page has the simulated
points that ``roi`` made, and computes money, break-even and energy from the GPUs.
"""

from __future__ import annotations

import shlex
from typing import Any

from pydantic import ConfigDict, Field

from pdtrim.cost.worth import HOURS_A_YEAR
from pdtrim.errors import PdtrimError
from pdtrim.records import Part
from pdtrim.report.page.record import Case, Run, Savings, Source, Table

CLOSED = "gpu_hour"
"""The input that no simulation depends on."""
LENGTHS = "--isl, --osl"
"""What roi says of lengths that were not a trace's."""
LABELS = (
    ("prefill GPUs", "prefill_gpus", 1.0, ",.0f"),
    ("decode GPUs", "decode_gpus", 1.0, ",.0f"),
    ("TTFT at the quantile, s", "ttft_quantile_s", 1.0, ".3f"),
    ("TTFT, mean, s", "ttft_s", 1.0, ".3f"),
    ("in queues, s", "queue_s", 1.0, ".3f"),
    ("in prefill, s", "prefill_s", 1.0, ".3f"),
    ("outside the GPUs, s", "front_s", 1.0, ".3f"),
    ("in the handover, s", "handover_s", 1.0, ".4f"),
    ("handover, MB a prompt", "handover_bytes", 1e6, ",.1f"),
    ("TPOT, mean, s", "tpot_s", 1.0, ".4f"),
    ("requests a second a GPU", "goodput_per_gpu", 1.0, ".2f"),
)


class _Side(Part):
    model_config = ConfigDict(frozen=True, extra="allow")
    reached: bool
    reason: str | None = None
    gpus: int | None = Field(default=None, gt=0)
    kwh_a_year: float | None = Field(default=None, ge=0)

    def value(self, name: str) -> float | None:
        found = (self.model_extra or {}).get(name)
        return found if isinstance(found, int | float) else None


class _Saving(Part):
    work_cost: float = Field(ge=0)


class _Row(Part):
    input: str
    low: float | None
    high: float | None
    low_reason: str = ""
    high_reason: str = ""


class _Roi(Part):
    pair: str
    system: str
    inputs: dict[str, float]
    options: dict[str, float | str | tuple[str, ...]] = Field(default_factory=dict)
    sources: dict[str, str]
    dense: _Side
    pruned: _Side
    saving: _Saving
    sensitivity: tuple[_Row, ...]


def roi(path: str, data: Any) -> Run:
    """Of ``roi --json``."""
    found = _Roi.model_validate(data)
    price = found.inputs.get(CLOSED, 0.0)
    if price <= 0:
        raise PdtrimError(f"{path} is damaged: inputs has no gpu_hour above 0")
    sides = {"dense": found.dense, "pruned": found.pruned}
    given = found.sources.get("work") == "--work-cost"
    words = ["pdtrim", "roi", found.pair, "--system", found.system]
    traced = found.sources.get("lengths", LENGTHS) != LENGTHS
    if traced:
        words += ["--trace", found.sources["lengths"]]
    for name, value in found.inputs.items():
        if traced and name in ("isl", "osl"):
            continue
        words += ["--" + name.replace("_", "-"), f"{value:g}"]
    for name, given_value in found.options.items():
        words += ["--" + name.replace("_", "-"), _word(given_value)]
    cells = [
        (label, *(_cell(side.value(key), unit, form) for side in sides.values()))
        for label, key, unit, form in LABELS
    ]
    facts = (
        ("pair", found.pair),
        ("system", found.system),
        *((name, f"{value:g}") for name, value in found.inputs.items()),
    )
    command = f"{shlex.join(words)} --json > ROI"
    return Run(
        source=Source(path=path, kind="roi", facts=facts, command=command),
        savings=Savings(
            dense_gpus=found.dense.gpus,
            pruned_gpus=found.pruned.gpus,
            reasons=tuple(f"{n}: {s.reason}" for n, s in sides.items() if not s.reached),
            gpu_hour=price,
            work_cost=found.saving.work_cost,
            search_s=None if given else found.saving.work_cost / price * 3600,
            gpu_watts=_watts(found.dense),
            cases=tuple(_cases(found.sensitivity, price)),
            table=Table(title="The two fleets", columns=("", "dense", "pruned"), rows=tuple(cells)),
            sources=tuple(found.sources.items()),
        ),
    )


def _word(value: float | str | tuple[str, ...]) -> str:
    if isinstance(value, tuple):
        return ",".join(value)
    return value if isinstance(value, str) else f"{value:g}"


def _cell(value: float | None, unit: float, form: str) -> str:
    return "-" if value is None else format(value / unit, form)


def _watts(side: _Side) -> float | None:
    if side.gpus is None or side.kwh_a_year is None:
        return None
    return side.kwh_a_year * 1e3 / (side.gpus * HOURS_A_YEAR)


def _cases(rows: tuple[_Row, ...], price: float) -> list[Case]:
    """A saving is a whole number of GPUs at a price, so the GPUs can be had back from it."""
    cases = []
    for row in rows:
        if row.input == CLOSED:
            continue
        for text, money, reason in (
            ("25 % lower", row.low, row.low_reason),
            ("25 % higher", row.high, row.high_reason),
        ):
            gpus = None if money is None else round(money / (price * HOURS_A_YEAR))
            cases.append(Case(label=f"{row.input} {text}", gpus=gpus, reason=reason))
    return cases
