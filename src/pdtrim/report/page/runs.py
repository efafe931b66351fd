"""Any RUN into one record: what kind of run it is, said by what is in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pdtrim.errors import PdtrimError
from pdtrim.reading.json_text import read_json
from pdtrim.records import first_problem
from pdtrim.report.page import ablations, plans, results, savings, speeds
from pdtrim.report.page.record import Run

MAX_BYTES = 64 * 2**20
MOST_RUNS = 64
ACCEPTED = (
    "a plan, a pair's folder, a folder of sensitivity, or a result of eval, kv-sweep, compare,"
    " demo, ablate, bench-codec, bench-transfer, bench-stages or roi --json"
)
SCHEMAS: dict[str, Callable[[str, Any], Run]] = {
    "pdtrim.result/1": results.text_result,
    "pdtrim.tasks/1": results.tasks_result,
    "pdtrim.compare/1": results.comparison,
    "pdtrim.plan/1": plans.plan,
}
KEYS: tuple[tuple[set[str], Callable[[str, Any], Run]], ...] = (
    ({"dense", "pruned", "saving", "sensitivity"}, savings.roi),
    ({"codecs", "raw_bytes"}, speeds.codecs),
    ({"rows", "raw_bytes", "transport"}, speeds.transfer),
    ({"rows", "shape", "code"}, speeds.stages),
    ({"cells"}, ablations.ablation),
    ({"rows", "versions", "host"}, speeds.pulls),
)
"""Of files without a schema: keys that tell them apart, the first that fit count."""


def read_runs(paths: list[str]) -> list[Run]:
    """Each RUN as a record.

    Raises:
        PdtrimError: none, too many, or one that is not understood, which is named.
    """
    if not 0 < len(paths) <= MOST_RUNS:
        raise PdtrimError(f"give 1 to {MOST_RUNS} runs, not {len(paths)}: {ACCEPTED}")
    return [read_run(path) for path in paths]


def read_run(path: str) -> Run:
    """One RUN.

    Raises:
        PdtrimError: missing, damaged, too large, or not understood.
    """
    place = Path(path)
    if not place.is_dir():
        return _file(place, path)
    if (place / "prefill" / "config.json").is_file():
        return plans.pair(place)
    if (place / "result.json").is_file():
        return _file(place / "result.json", path)
    names = {"KL": "table.md", "recall": "recall.md"}
    found = {what: place / name for what, name in names.items() if (place / name).is_file()}
    if "KL" not in found:
        raise PdtrimError(f"{path} is not understood: give {ACCEPTED}")
    return plans.sensitivity(found, path)


def _file(file: Path, path: str) -> Run:
    if file.suffix == ".md":
        return plans.sensitivity({"KL": file}, path)
    data = read_json(file, limit=MAX_BYTES)
    reader = _reader(data)
    if reader is None:
        raise PdtrimError(f"{file} is not understood: give {ACCEPTED}")
    try:
        return reader(path, data)
    except ValidationError as error:
        raise PdtrimError(f"{file} is damaged: {first_problem(error)}") from error


def _reader(data: Any) -> Callable[[str, Any], Run] | None:
    if not isinstance(data, dict):
        return None
    schema = data.get("schema")
    if schema is not None:
        return SCHEMAS.get(schema) if isinstance(schema, str) else None
    return next((reader for keys, reader in KEYS if keys <= data.keys()), None)
