"""Rows of a task, whatever source they come from, in the columns that lm-eval's task reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pdtrim.errors import PdtrimError

MAX_BYTES = 256_000_000
"""The largest file of rows that is read; the largest known, HellaSwag's, has 11 MB."""

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The items of a task in the source's order, and rows that shots may be drawn from.

    Attributes:
        overrides: entries of the task's definition that these rows replace: columns that are ready
            where lm-eval's task would make them from others.
    """

    items: list[Row]
    shots: list[Row] = field(default_factory=list)
    overrides: dict[str, Any] = field(default_factory=dict)


def lettered(question: str, text: str, choices: list[str], answer: int) -> Row:
    """A question with lettered choices, as ARC and OpenBookQA have it.

    Args:
        question: the column of the question.
    """
    letters = [chr(ord("A") + i) for i in range(len(choices))]
    return {
        question: text,
        "choices": {"text": choices, "label": letters},
        "answerKey": letters[answer],
    }


def check_size(path: Path) -> None:
    """Raise :class:`PdtrimError` for a file that is too large to be a benchmark's."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise PdtrimError(f"{path} has {size} bytes: files above {MAX_BYTES} are not read")
