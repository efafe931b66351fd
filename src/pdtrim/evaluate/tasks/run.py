"""Run one benchmark task on one trimmed pair."""

from __future__ import annotations

import importlib.util
import math
from importlib.metadata import version

from pdtrim.errors import PdtrimError
from pdtrim.evaluate.configs import TasksConfig
from pdtrim.evaluate.tasks.definitions import check_name, definition_of
from pdtrim.evaluate.tasks.folder import read_folder
from pdtrim.evaluate.tasks.olmo import read_olmo
from pdtrim.evaluate.tasks.scores import TaskScores
from pdtrim.evaluate.tasks.wikitext import perplexity, text_of_source
from pdtrim.progress import Progress, silent
from pdtrim.stage.forward import Trimmed


def run_task(
    trimmed: Trimmed, task: str, config: TasksConfig, *, progress: Progress = silent
) -> TaskScores:
    """Scores of a task's items under prefill/decode inference.

    Args:
        task: one of :data:`~pdtrim.evaluate.tasks.definitions.TASKS`.

    Raises:
        PdtrimError: unknown task, a source that lacks it or cannot be read, too few rows to draw
            shots from, an answer longer than the model reads, or lm-eval is not installed.
    """
    check_name(task)
    if task == "wikitext":
        if config.shots:
            raise PdtrimError("'wikitext' has no shots: leave --shots out")
        return perplexity(
            trimmed,
            text_of_source(config.data),
            source=config.source,
            window=config.window_tokens,
            limit=config.limit,
            batch_tokens=config.batch_tokens,
            progress=progress,
        )
    need_lm_eval()
    return _run_lm_eval(trimmed, task, config, progress)


def need_lm_eval() -> None:
    """Raise :class:`PdtrimError` where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise PdtrimError("benchmark tasks need the package lm-eval: pip install 'pdtrim[eval]'")


def _run_lm_eval(
    trimmed: Trimmed, task: str, config: TasksConfig, progress: Progress
) -> TaskScores:
    from pdtrim.evaluate.tasks.harness import parts_of_hub, parts_of_rows, run_parts

    definition = definition_of(task)
    shots = definition.shots if config.shots is None else config.shots
    if config.data == "hub":
        parts = parts_of_hub(task, definition, limit=config.limit, shots=shots)
    else:
        rows = read_olmo(task) if config.data == "olmo" else read_folder(config.data, task)
        parts = parts_of_rows(task, definition, rows, limit=config.limit, shots=shots)
    outcome = run_parts(trimmed, parts, batch_tokens=config.batch_tokens, progress=progress)
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
