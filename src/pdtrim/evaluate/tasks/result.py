"""Tasks of a plan beside the dense model: what ``pdtrim eval --tasks`` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field
from rich.table import Table

from pdtrim.bundle import TrimPlan
from pdtrim.errors import PdtrimError
from pdtrim.evaluate.configs import TasksConfig
from pdtrim.evaluate.statistics import paired_difference
from pdtrim.evaluate.tasks.definitions import check_name
from pdtrim.evaluate.tasks.run import need_lm_eval, run_task
from pdtrim.evaluate.tasks.scores import TaskScores
from pdtrim.exported import base_model
from pdtrim.keep.document import Document
from pdtrim.progress import Progress, silent
from pdtrim.records import Frozen
from pdtrim.stage.forward import Trimmed
from pdtrim.versions import host, versions

SEED = 0  # of the bootstrap


class TasksRow(Frozen):
    """One variant: its name and its scores by task."""

    name: str
    tasks: dict[str, TaskScores]


class TasksResult(Document):
    """The dense model and a plan on the same items.

    Attributes:
        plan_digest: of the plan, which is the second row.
    """

    schema_id: Literal["pdtrim.tasks/1"] = Field(default="pdtrim.tasks/1", alias="schema")
    model: str
    model_fingerprint: str
    plan_digest: str
    dtype: str
    device: str
    versions: dict[str, str]
    host: dict[str, str | int]
    rows: tuple[TasksRow, ...]


def evaluate_tasks(
    pair: str | Path,
    tasks: Sequence[str],
    config: TasksConfig,
    *,
    model: str | None = None,
    dtype: str = "bfloat16",
    device: str = "cpu",
    progress: Progress = silent,
) -> TasksResult:
    """Rows ``dense`` and the plan's method.

    Args:
        pair: a plan file, or a folder that ``export`` wrote.
        model: where the dense model is, if not where the plan says.

    Raises:
        PdtrimError: unreadable plan, pair or model, no tasks, or as :func:`run_task`.
    """
    if not tasks or len(set(tasks)) < len(tasks):
        raise PdtrimError("give at least one task, and each only once")
    for task in tasks:
        check_name(task)
    if set(tasks) != {"wikitext"}:
        need_lm_eval()
    trim = TrimPlan.open(pair)
    plan = trim.plan
    dense = base_model(plan, source=model, dtype=dtype, device=device)
    trimmed = Trimmed.of(plan, trim.pair(dense))
    variants = (("dense", Trimmed.dense(dense)), (trim.name, trimmed))
    return TasksResult(
        model=dense.name,
        model_fingerprint=dense.fingerprint,
        plan_digest=plan.digest,
        dtype=dtype,
        device=device,
        versions=versions(),
        host=host(),
        rows=tuple(
            TasksRow(
                name=name,
                tasks={task: run_task(variant, task, config, progress=progress) for task in tasks},
            )
            for name, variant in variants
        ),
    )


def tasks_table(result: TasksResult) -> Table:
    """Main metrics by task, with the paired 95 % interval of the difference."""
    dense, plan = result.rows
    view = Table(
        title=f"{result.model}, {result.dtype}",
        caption="difference: plan minus dense on the same items, 95 % interval; in points,\n"
        "but for ppl, where it is of the windows' NLL in nats a token",
    )
    for name in ("task", "metric", "items", dense.name, plan.name, "difference"):
        view.add_column(name, justify="left" if name == "task" else "right", no_wrap=True)
    for task, ours in plan.tasks.items():
        theirs = dense.tasks[task]
        main = ours.main
        scale, digits = (1.0, 3) if main == "ppl" else (100.0, 1)
        view.add_row(
            task,
            main,
            str(ours.count),
            *(f"{row.metrics[main] * scale:.1f}" for row in (theirs, ours)),
            _difference(ours, theirs, scale, digits=digits),
        )
    return view


def _difference(ours: TaskScores, theirs: TaskScores, scale: float, *, digits: int) -> str:
    assert ours.items_hash == theirs.items_hash, "both rows run the same items"
    if ours.count < 2:
        return "one item"
    a, b = ([scale * value for value in row.items[row.main]] for row in (ours, theirs))
    gap = paired_difference(a, b, seed=SEED)
    return f"{gap.mean:+.{digits}f} [{gap.low:+.{digits}f}, {gap.high:+.{digits}f}]"
