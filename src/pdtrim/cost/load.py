"""The load of a fleet: lengths of prompts and answers, and how often they come."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdtrim.cost.queueing import poisson_arrivals
from pdtrim.errors import PdtrimError
from pdtrim.reading.json_text import parse_json, read_bytes
from pdtrim.records import MOST_TOKENS

MAX_BYTES = 256 * 2**20
NAMES = {
    "prompt": ("prompt_tokens", "input_length", "isl"),
    "answer": ("output_tokens", "output_length", "osl"),
    "arrival": ("arrival_s", "timestamp_s"),
}
"""Keys of a trace's line; ``input_length`` and ``output_length`` are those of public traces."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests.

    Attributes:
        prompts, answers: tokens of each request that was seen; drawn from again and again.
        rate: requests a second; None if nobody said.
    """

    prompts: tuple[int, ...]
    answers: tuple[int, ...]
    rate: float | None
    source: str

    @property
    def mean_prompt(self) -> float:
        """Tokens."""
        return sum(self.prompts) / len(self.prompts)

    @property
    def mean_answer(self) -> float:
        """Tokens."""
        return sum(self.answers) / len(self.answers)

    def drawn(self, count: int, rng: random.Random) -> Requests:
        """So many of the requests, at random times of the load's rate."""
        assert self.rate is not None
        lengths = rng.choices(tuple(zip(self.prompts, self.answers, strict=True)), k=count)
        return Requests(at=poisson_arrivals(self.rate, count, rng), lengths=lengths)


@dataclass(frozen=True, kw_only=True)
class Requests:
    """One run of a load.

    Attributes:
        at: seconds at which each request comes, growing.
        lengths: tokens of its prompt and of its answer.
    """

    at: Sequence[float]
    lengths: Sequence[tuple[int, int]]


def read_trace(path: str | Path, rate: float | None = None) -> Load:
    """A JSONL trace: an object a line with a prompt's and an answer's tokens.

    Keys are ``prompt_tokens`` and ``output_tokens``, or ``input_length`` and ``output_length``;
    with ``arrival_s`` on all lines the rate is the trace's, if none is given.

    Raises:
        PdtrimError: no such file, too large, or a line that is no such object.
    """
    prompts: list[int] = []
    answers: list[int] = []
    arrivals: list[float] = []
    for number, line in enumerate(read_bytes(path, limit=MAX_BYTES).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        row = parse_json(line, where=where)
        prompts.append(_count(row, "prompt", where))
        answers.append(_count(row, "answer", where))
        if (at := _first(row, "arrival")) is not None:
            if isinstance(at, bool) or not isinstance(at, int | float):
                raise PdtrimError(f"{where}: the arrival must be a number of seconds")
            arrivals.append(float(at))
    if not prompts:
        raise PdtrimError(f"{path} has no requests: give a JSON object a line")
    if rate is None and len(arrivals) == len(prompts) > 1:
        span = max(arrivals) - min(arrivals)
        rate = (len(arrivals) - 1) / span if span > 0 else None
    return Load(prompts=tuple(prompts), answers=tuple(answers), rate=rate, source=str(path))


def _first(row: Any, kind: str) -> Any:
    if not isinstance(row, dict):
        return None
    return next((row[name] for name in NAMES[kind] if name in row), None)


def _count(row: Any, kind: str, where: str) -> int:
    value = _first(row, kind)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MOST_TOKENS:
        raise PdtrimError(
            f"{where}: needs a whole number above 0 as one of {', '.join(NAMES[kind])}"
        )
    return value


def need_positive(**numbers: float | None) -> None:
    """Raise PdtrimError for the first option that is there and not a number above 0."""
    for name, number in numbers.items():
        if number is not None and not 0 < number < math.inf:
            option = "--" + name.replace("_", "-")
            raise PdtrimError(f"{option} {number:g}: give a number above 0")
