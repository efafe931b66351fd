"""Plans, pairs and the sensitivity of blocks: what each stage runs, and why."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

from pdtrim.errors import PdtrimError
from pdtrim.exported import plan_of
from pdtrim.plan import PrunePlan
from pdtrim.reading.json_text import read_bytes
from pdtrim.report.page.record import HeatMap, Run, Source, Stages

MAX_TABLE_BYTES = 2**20
MOST_BLOCKS, MOST_WAYS = 512, 16
UNITS = {"recall": "NLL above dense, nats an answer"}
KL = "KL, nats a token"


def plan(path: str, data: Any) -> Run:
    """Of ``pdtrim.plan/1``."""
    return _run(path, PrunePlan.from_json(data, source=path), kind="plan")


def _run(path: str, made: PrunePlan, *, kind: str) -> Run:
    gates, p = made.gates, made.provenance
    sent: dict[str, list[int]] = {}
    for layer in made.sent_layers:
        sent.setdefault(made.kv[layer].text, []).append(layer)
    notes = []
    if made.replacements:
        notes.append(f"{len(made.replacements)} blocks have weights of their own.")
    if made.widths is not None:
        notes.append("Blocks that run may be narrower than the dense model's.")
    facts = [
        ("model", made.model.name),
        ("model fingerprint", made.model.fingerprint),
        ("plan digest", made.digest),
        ("method", f"{p.method}, {p.mode}, repair {p.repair}, distillation {p.distillation}"),
        ("calibration", f"{p.calibration} {p.calibration_hash[:16]}"),
        ("seed", str(p.seed)),
        ("search", f"{p.search_block_tokens:,} block-tokens, {p.wall_s:,.0f} s"),
        ("versions", ", ".join(f"{k} {v}" for k, v in p.versions.items()) or "not recorded"),
    ]
    if p.held_out is not None:
        facts.insert(4, ("held-out KL of the plan", f"{p.held_out.kl:.4f} nats a token"))
    make = f"pdtrim plan {shlex.quote(made.model.name)} -o PLAN"
    command = make if kind == "plan" else f"pdtrim export PLAN -o {shlex.quote(path)}"
    return Run(
        source=Source(path=path, kind=kind, facts=tuple(facts), command=command),
        stages=Stages(
            attention={
                "prefill": tuple(gates.prefill_attention),
                "decode": tuple("full" if on else "off" for on in gates.decode_attention),
            },
            mlp={"prefill": gates.prefill_mlp, "decode": gates.decode_mlp},
            sent=tuple((text, _ranges(layers)) for text, layers in sent.items()),
            notes=tuple(notes),
        ),
    )


def pair(folder: Path) -> Run:
    """Of an exported pair's folder.

    Raises:
        PdtrimError: a stage's config was altered, or the two are not of one export.
    """
    return _run(str(folder), plan_of(folder), kind="export")


def sensitivity(files: dict[str, Path], path: str) -> Run:
    """Of the tables that ``pdtrim sensitivity`` writes.

    Args:
        files: by what was measured, ``KL`` and perhaps ``recall``.
    """
    return Run(
        source=Source(
            path=path,
            kind="sensitivity",
            facts=(("model, text, seed, versions", "not recorded in this run"),),
            command="pdtrim sensitivity MODEL -o FOLDER",
        ),
        maps=tuple(_map(what, file) for what, file in files.items()),
    )


def _map(what: str, file: Path) -> HeatMap:
    data = read_bytes(file, limit=MAX_TABLE_BYTES)
    refused = PdtrimError(f"{file} is no table of 'pdtrim sensitivity': a row a block, numbers")
    try:
        lines = [line for line in data.decode("utf-8").splitlines() if line.strip()]
        head, rule, *body = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
        rows = [[float(cell) for cell in row] for row in body]
    except ValueError as error:
        raise refused from error
    ways = tuple(head[1:])
    good = head[:1] == ["block"] and set("".join(rule)) <= {"-", ":"} and ways and rows
    if not good or any(len(row) != len(head) or not all(map(math.isfinite, row)) for row in rows):
        raise refused
    if len(rows) > MOST_BLOCKS or len(ways) > MOST_WAYS:
        raise PdtrimError(f"{file} has {len(rows)} blocks and {len(ways)} ways: too many to show")
    losses = tuple(tuple(row[1 + way] for row in rows) for way in range(len(ways)))
    return HeatMap(
        title=f"{what} of losing one block", unit=UNITS.get(what, KL), ways=ways, losses=losses
    )


def _ranges(layers: list[int]) -> str:
    """Layers as runs, such as ``0-3, 5``."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and parts[-1][1] == layer - 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
