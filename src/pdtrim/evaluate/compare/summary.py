"""From measurements to rows: averages, their intervals, and paired differences.

An item's score is its mean over the seeds of a system, so an interval says what other items of the
same tasks would change, and the spread over seeds what other calibration text would.

Shapes: n items of a task.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdtrim.errors import PdtrimError
from pdtrim.evaluate.compare.measure import DENSE, MeasuredRun
from pdtrim.evaluate.compare.records import Run, SystemRow, TaskInfo
from pdtrim.evaluate.compare.systems import System
from pdtrim.evaluate.statistics import Interval, average_interval, paired_average

SAMPLES = 4000
BOOTSTRAP_SEED = 0

Items = list[NDArray[np.float64]]


def task_infos(measured: Mapping[str, Sequence[MeasuredRun]]) -> tuple[TaskInfo, ...]:
    """The tasks, which must be the same for every system.

    Raises:
        PdtrimError: two systems were given a task of different versions, shots or items.
    """
    found: dict[str, TaskInfo] = {}
    for name, runs in measured.items():
        for one in runs:
            for task, scores in one.scores.items():
                info = TaskInfo(**scores.model_dump(include=set(TaskInfo.model_fields)))
                if found.setdefault(task, info) != info:
                    raise PdtrimError(
                        f"'{name}' and '{next(iter(measured))}' were not given the same {task}"
                        f" (version, shots or items): delete the cells {task}.json of both"
                    )
    return tuple(found.values())


def summarise(
    systems: Sequence[System], measured: Mapping[str, Sequence[MeasuredRun]]
) -> tuple[tuple[SystemRow, ...], str | None]:
    """Rows of the dense model and of the systems, and the name of the best baseline.

    Args:
        measured: by system, with ``dense``.

    Raises:
        PdtrimError: scores without an interval, as of a task with a single item.
    """
    items = {name: _items(runs) for name, runs in measured.items()}
    best = _best_baseline(systems, items)
    dense = measured[DENSE][0]
    rows = [_row(None, measured[DENSE], items, best, dense.run)]
    rows += [_row(system, measured[system.name], items, best, dense.run) for system in systems]
    return tuple(rows), best


def average_of(one: MeasuredRun) -> float | None:
    """A run's average over the tasks that have one."""
    scores = [one.run.scores[task] for task, found in one.scores.items() if found.main != "ppl"]
    return statistics.mean(scores) if scores else None


def _items(runs: Sequence[MeasuredRun]) -> Items:
    """Scores of each task's items, means over seeds; perplexities are left out."""
    tables: dict[str, list[tuple[float, ...]]] = {}
    for one in runs:
        for task, scores in one.scores.items():
            if scores.main != "ppl":
                tables.setdefault(task, []).append(scores.items[scores.main])
    return [np.asarray(table).mean(axis=0) for table in tables.values()]


def _best_baseline(systems: Sequence[System], items: Mapping[str, Items]) -> str | None:
    averages = {
        system.name: float(np.mean([a_n.mean() for a_n in items[system.name]]))
        for system in systems
        if system.is_baseline and items[system.name]
    }
    return max(averages, key=lambda name: averages[name]) if averages else None


def _row(
    system: System | None,
    runs: Sequence[MeasuredRun],
    items: Mapping[str, Items],
    best: str | None,
    dense: Run,
) -> SystemRow:
    """One system's row; None is the dense model."""
    name = system.name if system else DENSE
    told = tuple(one.run.model_copy(update={"average": average_of(one)}) for one in runs)
    asked = system if system and not system.given else None
    row = SystemRow(
        name=name,
        method=system.method if system else DENSE,
        setting=system.setting if system else None,
        trained=system is not None and system.trained,
        asked_prefill=asked.prefill_share if asked else None,
        asked_decode=asked.decode_share if asked else None,
        runs=told,
    )
    made = [run for run in told if run.failed is None]
    if not made:
        return row.model_copy(update={"failed": told[0].failed})
    update = {**_means(made, dense), **_scores(runs)}
    if items[name]:
        own = [run.average for run in made if run.average is not None]
        average = average_interval(items[name], seed=BOOTSTRAP_SEED, samples=SAMPLES)
        update |= {"average": average, "spread": (min(own), max(own))}
        if system:
            theirs = float(np.mean([a_n.mean() for a_n in items[DENSE]]))
            update["of_dense"] = average.mean / theirs if theirs else None
            update["to_dense"] = _difference(items, name, DENSE)
        if system and best and best != name:
            update["to_baseline"] = _difference(items, name, best)
    return row.model_copy(update=update)


def _difference(items: Mapping[str, Items], name: str, other: str) -> Interval:
    return paired_average(items[name], items[other], seed=BOOTSTRAP_SEED, samples=SAMPLES)


def _means(made: Sequence[Run], dense: Run) -> dict[str, Any]:
    """What a plan costs and saves, means over the seeds that have one."""
    facts = [run.facts for run in made if run.facts]
    times = [run.times for run in made if run.times]
    assert len(facts) == len(made) and dense.facts
    kv_bytes = statistics.mean(fact.kv_bytes for fact in facts)
    update: dict[str, Any] = {
        "prefill_removed": statistics.mean(fact.prefill_removed for fact in facts),
        "decode_removed": statistics.mean(fact.decode_removed for fact in facts),
        "kv_bytes": kv_bytes,
        "kv_compression": dense.facts.kv_bytes / kv_bytes if kv_bytes else None,
        "search_block_tokens": statistics.mean(run.search_block_tokens for run in made),
        "wall_s": statistics.mean(run.wall_s for run in made),
    }
    if times:
        update["prefill_time"] = statistics.mean(taken.prefill for taken in times)
        update["decode_time"] = statistics.mean(taken.decode for taken in times)
    return update


def _scores(runs: Sequence[MeasuredRun]) -> dict[str, dict[str, float]]:
    """Means over seeds of each task's main metric, perplexities apart."""
    update: dict[str, dict[str, float]] = {"scores": {}, "ppl": {}}
    made = [one for one in runs if one.run.failed is None]
    for task, found in made[0].scores.items():
        mean = statistics.mean(one.run.scores[task] for one in made)
        update["ppl" if found.main == "ppl" else "scores"][task] = mean
    return update
