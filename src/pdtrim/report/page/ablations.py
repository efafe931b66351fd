"""What ``pdtrim ablate`` measured."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from pdtrim.records import Part
from pdtrim.report.page.record import Run, Source, Table
from pdtrim.report.page.results import machine


class _Cell(Part):
    group: str
    name: str
    seed: int
    kl: dict[str, float]
    removed: str


class _Ablation(Part):
    model: str = "not recorded"
    versions: dict[str, str] = Field(default_factory=dict)
    host: dict[str, str | int] = Field(default_factory=dict)
    cells: tuple[_Cell, ...]


def ablation(path: str, data: Any) -> Run:
    """Of its ``result.json``."""
    found = _Ablation.model_validate(data)
    texts = list(dict.fromkeys(text for cell in found.cells for text in cell.kl))
    rows = [
        (
            f"{cell.group}: {cell.name}",
            str(cell.seed),
            *("-" if text not in cell.kl else f"{cell.kl[text]:.4f}" for text in texts),
            cell.removed,
        )
        for cell in found.cells
    ]
    table = Table(
        title="Parts of the method, one against another",
        columns=("part", "seed", *(f"KL, {text}" for text in texts), "blocks removed"),
        rows=tuple(rows),
        note="KL to the dense model on held-out text, nats a token.",
    )
    facts = (("model", found.model), *machine(found.versions, found.host))
    known = tuple((name, value or "not recorded") for name, value in facts)
    command = "pdtrim ablate MODEL --text FILE -o FOLDER"
    return Run(
        source=Source(path=path, kind="ablate", facts=known, command=command), tables=(table,)
    )
