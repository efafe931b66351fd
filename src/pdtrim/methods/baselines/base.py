"""What the baselines share: modes, counts or shares, grains and budgets.

* Mode ``unified``, their default: blocks are ranked on all tokens for one model in both stages.
* Mode ``subset``: the same ranking; decode loses as many as it must, prefill those of them that
  the method would remove first. So prefill's set lies inside decode's.
* Mode ``projected``: each stage has a ranking of its own, where the method's score knows stages.

Rankings see the whole KV cache; the target's KV policy is written into the plan unseen. As in
method ``pdtrim``, prefill work that nothing reads is left out of the plan; it changes nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from pdtrim.errors import PlanError
from pdtrim.methods.base import Found, Method
from pdtrim.methods.problem import Problem
from pdtrim.plan import Mode
from pdtrim.search.state import Removal
from pdtrim.words import Grain


@dataclass(frozen=True, kw_only=True)
class PaperCalibration:
    """The text that a paper or its code calibrates on; None where that is not stated.

    It is a record only: every method gets the user's calibration text.
    """

    source: str
    sequences: int | None = None
    tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The state that a baseline ends with, what it paid, and its KL if that was measured."""

    state: Removal
    block_tokens: int
    kl: float | None = None


class Baseline(Method):
    """A method of the literature. Subclasses implement :meth:`choose`."""

    default_mode = "unified"
    modes: ClassVar[tuple[Mode, ...]] = ("unified", "subset", "projected")
    grains: ClassVar[tuple[Grain, ...]] = ("block",)
    metrics = ("blocks", "parameters")
    paper_calibration: ClassVar[PaperCalibration]

    @abstractmethod
    def choose(self, problem: Problem) -> Chosen:
        """The state that meets the goal.

        Raises:
            BudgetSpent: the target's budget does not suffice.
        """

    def solve(self, problem: Problem) -> Found:
        """Rank, unless nothing is to be removed."""
        state, mode = problem.dense(), problem.target.mode
        chosen = Chosen(state=state, block_tokens=0)
        if not problem.goal.met(state):
            chosen = self.choose(problem)
        if not problem.goal.met(chosen.state):
            raise PlanError(
                f"method '{self.name}' finds no units in mode '{mode}' that save what both stages"
                " must: ask for less of prefill, or use mode unified"
            )
        return Found(
            gates=chosen.state.gates.without_dead_work(),
            block_tokens=chosen.block_tokens,
            kl=chosen.kl,
        )
