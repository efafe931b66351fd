"""How fast this machine is at a search and at repairs, measured before they begin."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pdtrim.keep.journal import Journal
from pdtrim.models.model import Model
from pdtrim.search.goal import Goal
from pdtrim.search.objective import Objective
from pdtrim.search.state import Removal
from pdtrim.stage.forward import Batch

WALKS = 8.0
"""Dense passes over the fitted text that all kinds of repair take for one finalist, at most."""
FITTED = 0.5
"""Of the layers, those from the first change on, whose projections are fitted."""
GRAM64 = 2.0
"""Of a Gram matrix in float32, one in float64."""
ROWS, SHARE = 256, 4  # of the Gram matrix that is timed: tokens, and the part of its width solved


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds.

    Attributes:
        block_token_s: of a token through a block, the head's share included.
        gram_s: of a token's share in the Gram matrix of the widest projection.
        solve_s: of a system of equations of that width.
    """

    block_token_s: float
    gram_s: float
    solve_s: float

    def repair_seconds(self, model: Model, fit: Batch, goal: Goal, finalists: int) -> float:
        """Of the repairs of some finalists, of which all but the first take one kind only."""
        tokens = fit.prompt_BP.numel() + fit.continuation_BC.numel()
        stages = sum(goal.least(stage) > 0 for stage in ("prefill", "decode"))
        walks = stages * (WALKS + finalists - 1) * tokens * model.num_layers * self.block_token_s
        fits = FITTED * model.num_layers * (self.gram_s * tokens + self.solve_s)
        return walks + stages * finalists * fits

    def ahead_seconds(self, model: Model, fit: Batch, goal: Goal) -> float:
        """Of the fits of keys and values that a search asks for, about."""
        part = model.config.hidden_size / model.config.intermediate_size
        gram = GRAM64 * self.gram_s * part**2 * fit.prompt_BP.numel()
        return goal.least("prefill") ** 2 * (gram + self.solve_s * part**3)


def measured_pace(model: Model, objective: Objective, journal: Journal | None) -> Pace:
    """Time the dense model on a part of the search's text, and a fit of few tokens.

    Args:
        journal: of the search, which then has the same pace when it is resumed.
    """

    def measure() -> list[float]:
        dense = Removal(num_layers=model.num_layers, mode="projected")
        seconds, tokens = objective.timed(dense)
        width = int(model.config.intermediate_size)
        x_RF = torch.randn(ROWS, width, device=model.device)
        gram_s = _seconds(lambda: x_RF.T @ x_RF) / ROWS
        square = torch.eye(max(width // SHARE, 1), dtype=torch.float64, device=model.device)
        solve_s = _seconds(lambda: torch.linalg.solve(square, square)) * SHARE**3
        return [seconds / tokens, gram_s, solve_s]

    values = measure() if journal is None else journal.once({"pace": "seconds"}, measure)
    return Pace(block_token_s=values[0], gram_s=values[1], solve_s=values[2])


def minutes(seconds: float) -> str:
    """In words, such as ``3 min``."""
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _seconds(work: Callable[[], torch.Tensor]) -> float:
    """Of the second of two runs; the first may have to make room."""
    for _ in range(2):
        begun = time.perf_counter()
        float(work().sum())  # waits for a GPU
    return time.perf_counter() - begun
