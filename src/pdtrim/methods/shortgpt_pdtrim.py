"""``shortgpt+pdtrim``: ShortGPT chooses the first blocks, the stage-aware search goes on from them.

The PDTrim paper (2509.04467) reports its method built into others, without saying how. Here the
blocks of least influence (ShortGPT, 2403.03853), ranked for each stage on the tokens that it sees,
take the place of greedy removal as the state that annealing starts from. Objective, re-ranking and
repair are those of method ``pdtrim``. Both rankings and swaps are paid for.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from pdtrim.errors import PlanError
from pdtrim.methods.baselines.shortgpt import ShortGPT
from pdtrim.methods.pdtrim import TILTED, PDTrim
from pdtrim.methods.problem import Problem
from pdtrim.search.anneal import Annealing, anneal
from pdtrim.search.goal import Goal
from pdtrim.search.objective import Measured, Objective


@dataclass(frozen=True, kw_only=True)
class ShortGPTPDTrim(PDTrim):
    """Settings are those of ``pdtrim``; annealing takes more steps, as nothing comes before it."""

    name = "shortgpt+pdtrim"
    grains = ("block",)
    splits = (TILTED,)
    annealing: Annealing = field(default_factory=lambda: Annealing(steps=160))

    def explore(self, problem: Problem, objective: Objective, goal: Goal) -> Measured:
        """See the module's docstring."""
        if problem.target.search not in ("hybrid", "anneal"):
            raise PlanError(
                f"method '{self.name}' anneals from ShortGPT's choice: use search anneal"
            )
        ranked = ShortGPT().choose(problem)
        objective.spent += ranked.block_tokens
        start = objective.measure(ranked.state)
        with problem.progress("annealing from ShortGPT's choice", self.annealing.steps) as advance:
            rng = random.Random(problem.target.seed)
            return anneal(objective, start, goal, self.annealing, rng=rng, advance=advance)
