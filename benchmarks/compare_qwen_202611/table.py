"""The tables of this page from what ``run.py`` has measured so far: no model, no GPU.

    python table.py --data DATA --out OUT --share 20

Writes OUT/20/result.json and table.md as ``pdtrim compare`` does, of the systems whose tasks are
all there, and OUT/20/known.md: the tasks on which the dense model beats the best constant answer by
two standard errors, a rule that was fixed before the run.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pdtrim.evaluate.compare.measure import DENSE, MeasuredRun, main_score
from pdtrim.evaluate.compare.records import Comparison, PairFacts, Run
from pdtrim.evaluate.compare.summary import summarise, task_infos
from pdtrim.evaluate.compare.systems import System, planned_systems
from pdtrim.evaluate.statistics import paired_average
from pdtrim.evaluate.tasks.folder import ITEMS
from pdtrim.evaluate.tasks.scores import TaskScores
from pdtrim.methods import METHODS
from pdtrim.plan import PrunePlan
from pdtrim.report.compare import markdown

FIELDS = ("answer", "label")
GENERATED = ("lambada_openai", "gsm8k")  # no constant answer
FOLDERS = {"lambada_openai": "lambada"}


def value(path: Path) -> Any:
    """What a cell holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def measured(folder: Path, cells: Path, tasks: Sequence[str], seed: int) -> MeasuredRun | None:
    """A system's run with one seed; None if some task is missing."""
    files = {task: cells / f"{task}.json" for task in tasks}
    pair = cells / "_pair.json"
    if not all(path.is_file() for path in (pair, *files.values())):
        return None
    scores = {task: TaskScores.model_validate(value(path)["value"]) for task, path in files.items()}
    run = Run(
        seed=seed,
        facts=PairFacts.model_validate(value(pair)["value"]),
        scores={task: main_score(found) for task, found in scores.items()},
    )
    taken = cells / "_latency.json"
    if taken.is_file():
        run = Run.model_validate({**run.model_dump(), "times": value(taken)["value"]})
    plan = folder / "plans" / f"{cells.name}.json"
    if plan.is_file():
        loaded = PrunePlan.load(plan)
        origin = loaded.provenance
        run = run.model_copy(
            update={
                "plan_digest": loaded.digest,
                "calibration": origin.calibration,
                "calibration_hash": origin.calibration_hash,
                "search_block_tokens": origin.search_block_tokens,
                "wall_s": origin.wall_s,
            }
        )
    return MeasuredRun(run=run, scores=scores)


def constant(data: Path, task: str, count: int) -> float:
    """The accuracy of the best constant answer on a task's first items."""
    if task in GENERATED:
        return 0.0
    place = data / FOLDERS.get(task, task)
    path = next(place / name for name in ITEMS if (place / name).is_file())
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][:count]
    field = next(name for name in FIELDS if name in rows[0])
    return max(Counter(row[field] for row in rows).values()) / len(rows)


def known_tasks(data: Path, dense: MeasuredRun) -> tuple[list[str], list[str]]:
    """The tasks that the dense model knows something of, and a table of the rule."""
    names, lines = (
        [],
        ["| task | items | dense | best constant | counts |", "|---|---:|---:|---:|---|"],
    )
    for task, scores in dense.scores.items():
        if scores.main == "ppl":
            continue
        right, base = main_score(scores), constant(data, task, scores.count)
        counts = right - base > 2 * math.sqrt(right * (1 - right) / scores.count)
        names += [task] if counts else []
        lines.append(
            f"| {task} | {scores.count} | {100 * right:.1f} | {100 * base:.1f} |"
            f" {'yes' if counts else 'no'} |"
        )
    return names, lines


def known_table(
    systems: Sequence[System], runs: dict[str, list[MeasuredRun]], names: Sequence[str]
) -> list[str]:
    """Averages over some tasks, best first, with the paired difference to the best baseline."""
    items = {
        name: [
            np.mean([one.scores[task].items[one.scores[task].main] for one in found], axis=0)
            for task in names
        ]
        for name, found in runs.items()
    }
    averages = {name: float(np.mean([a_n.mean() for a_n in own])) for name, own in items.items()}
    baselines = [system.name for system in systems if system.is_baseline]
    best = max(baselines, key=lambda name: averages[name], default=DENSE)
    lines = [
        f"| system | seeds | average | % of dense | to {best} [95 %] | ppl, first seed |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in sorted(averages, key=lambda name: -averages[name]):
        found = runs[name]
        own = [statistics.mean(one.run.scores[task] for task in names) for one in found]
        spread = f" ({100 * min(own):.1f} .. {100 * max(own):.1f})" if len(own) > 1 else ""
        to = "best"
        if name != best:
            gap = paired_average(items[name], items[best], seed=0, samples=4000)
            to = f"{100 * gap.mean:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]"
        ppl = [
            one.run.scores[task] for one in found[:1] for task in one.scores if task == "wikitext"
        ]
        lines.append(
            f"| `{name}` | {len(found)} | {100 * averages[name]:.1f}{spread} |"
            f" {100 * averages[name] / averages[DENSE]:.1f} | {to} |"
            f" {', '.join(f'{p:.1f}' for p in ppl)} |"
        )
    return lines


def given(folder: Path, known: Sequence[str]) -> list[System]:
    """Rows that were measured beside the planned systems."""
    names = {path.name.rpartition("-seed")[0] for path in (folder / "cells").glob("*-seed*")}
    return [
        System(
            name=name,
            method="pdtrim",
            setting="disaggregated",
            mode="projected",
            prefill_share=0.0,
            decode_share=0.0,
            trained=name.endswith("-trained"),
            given={0: folder},
        )
        for name in sorted(names - set(known))
    ]


def main() -> None:
    """Read the cells and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--share", default="20")
    parser.add_argument("--model", default="Qwen2.5-Coder-1.5B-Instruct")
    args = parser.parse_args()
    folder = args.out / args.share
    cells = folder / "cells"
    tasks = [path.stem for path in sorted((cells / DENSE).glob("[!_]*.json"))]
    systems = planned_systems(tuple(METHODS), float(f"0.{args.share}"))
    systems += given(folder, [system.name for system in systems])
    dense = measured(folder, cells / DENSE, tasks, 0)
    assert dense is not None, f"no dense model in {cells}"
    runs = {DENSE: [dense]}
    for system in systems:
        found = [measured(folder, cells / f"{system.name}-seed{s}", tasks, s) for s in range(3)]
        if made := [one for one in found if one is not None]:
            runs[system.name] = made
    systems = [system for system in systems if system.name in runs]
    rows, best = summarise(systems, runs)
    machine = json.loads((args.out / "machine.json").read_text(encoding="utf-8"))
    settings = value(cells / DENSE / "_pair.json")["settings"]
    result = Comparison(
        model=args.model,
        model_fingerprint=settings["model"],
        dtype=settings["dtype"],
        device="cuda",
        remove=float(f"0.{args.share}"),
        settings={
            **machine["settings"],
            "seeds": sorted({r.run.seed for v in runs.values() for r in v}),
        },
        tasks=task_infos(runs),
        best_baseline=best,
        rows=rows,
        versions=machine["versions"],
        host=machine["host"],
    )
    result.save(folder / "result.json")
    (folder / "table.md").write_text(markdown(result), encoding="utf-8")
    names, rule = known_tasks(args.data, dense)
    lines = [*rule, ""]
    if names:
        lines += known_table(systems, runs, names)
    (folder / "known.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
