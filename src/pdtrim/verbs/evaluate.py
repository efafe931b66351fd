"""Measure a plan's quality beside the dense model's: what ``pdtrim eval`` does."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from pdtrim.errors import PdtrimError
from pdtrim.keep.folder import output_file
from pdtrim.progress import Progress, silent

if TYPE_CHECKING:
    from pdtrim.evaluate.configs import EvalConfig
    from pdtrim.evaluate.result import Result
    from pdtrim.evaluate.tasks.result import TasksResult


def evaluate_pair(
    pair: str | Path,
    config: EvalConfig,
    output: str | Path | None = None,
    *,
    model: str | None = None,
    dtype: str = "bfloat16",
    device: str = "cpu",
    progress: Progress = silent,
) -> Result | TasksResult:
    """Run a plan's pair and the dense model on the same text, or on the same items of tasks.

    Args:
        pair: a plan file, or an exported pair's folder.
        config: has either ``text`` or ``tasks``.
        output: the result file to write; none if None.
        model: where the dense model is, if not where the plan says.

    Returns:
        Two rows, ``dense`` and the plan's: of text KL and NLL in nats a token and the bytes that a
        prompt's KV cache takes on the wire; of tasks their scores.

    Raises:
        PdtrimError: both or neither, an unreadable plan, pair, model or text, an unknown task, or
            a place that holds something else.
    """
    from pdtrim.evaluate.configs import TasksConfig
    from pdtrim.evaluate.run import evaluate_text
    from pdtrim.evaluate.tasks.result import evaluate_tasks

    if (config.text is None) == (not config.tasks):
        raise PdtrimError("give one of --text and --tasks")
    with ExitStack() as stack:
        if output is not None:
            stack.enter_context(output_file(Path(output)))
        result: Result | TasksResult
        if config.tasks:
            rows = TasksConfig(data=config.data, limit=config.limit, shots=config.shots)
            result = evaluate_tasks(
                pair, config.tasks, rows, model=model, dtype=dtype, device=device,
                progress=progress,
            )  # fmt: skip
        else:
            result = evaluate_text(
                pair, config, model=model, dtype=dtype, device=device, progress=progress
            )
        if output is not None:
            result.save(Path(output))
    return result
