"""``evopress``: evolutionary search on KL (EvoPress, arXiv 2410.14649).

With p the dense model's next-token distribution and q the pruned one's, the fitness is::

    f(S) = E_t[ KL( p(. | t) || q_S(. | t) ) ]

64 random states are scored and the best is the parent. Each generation makes 32 offspring by
min(U{1..3}, U{1..3}) swaps of a removed and a kept unit; they are selected on little text, the 2
best of them on more, and the last takes the parent's place if it is better on the whole text. For k
of n blocks the authors run about k (n - k) / 1.5 generations; ``generations`` sets another number.

The search is this library's, ``search/evolution.py``, whose docstring names the differences: the
parts of the text are the same in each selection, and both stages are searched together. Further:
the text is the user's, where the paper has 16 sequences of 8192 tokens of FineWeb-Edu; rounds grow
by doubling, where the paper's grow from 2048 tokens to 32768; the KL is that of continuation tokens
over the dense model's likeliest tokens and a bucket for the rest (``calibration/teacher.py``).

Grain ``block`` ties a block's attention and MLP. With grain ``part`` the paper removes as many
attentions as MLPs; here any units go that together are worth what is asked for. In modes
``subset`` and ``projected`` both stages' sets evolve together, in ``subset`` prefill's inside
decode's. A budget that ends the generations early is no error, as long as one state is measured.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from pdtrim.errors import PlanError
from pdtrim.methods.baselines.base import Baseline, Chosen, PaperCalibration
from pdtrim.methods.problem import Problem
from pdtrim.plan import STAGES
from pdtrim.search.evolution import Evolution, evolution
from pdtrim.search.goal import Goal

SWAPS = 1.5  # swaps that a state has, for each generation of the authors' runs


def paper_generations(goal: Goal, num_layers: int) -> int:
    """About k (n - k) / 1.5, summed over the stages that are searched; at least 1.

    k is the goal in blocks, as if all were worth the same.
    """
    whole = {stage: math.fsum(goal.savings(stage)) for stage in STAGES}
    counts = [num_layers * goal.needed(stage) / whole[stage] for stage in STAGES if whole[stage]]
    return max(1, round(sum(k * (num_layers - k) for k in counts) / SWAPS))


@dataclass(frozen=True, kw_only=True)
class EvoPress(Baseline):
    """Settings as in the paper; ``survive`` leaves 2 of 32 offspring behind the first round."""

    name = "evopress"
    grains = ("block", "part")
    paper_calibration = PaperCalibration(source="FineWeb-Edu", sequences=16, tokens=8192)
    starts: int = 64
    offspring: int = 32
    survive: float = 1 / 16
    generations: int | None = None

    def choose(self, problem: Problem) -> Chosen:
        """See the module's docstring."""
        goal, generations = problem.goal, self.generations
        if generations is None:
            generations = paper_generations(goal, problem.model.num_layers)
        config = Evolution(
            starts=self.starts,
            offspring=self.offspring,
            survive=self.survive,
            generations=generations,
        )
        objective = problem.objective()
        with problem.progress("searching: evopress", generations) as advance:
            start = objective.measure(problem.dense())
            best = evolution(
                objective,
                start,
                goal,
                config,
                rng=random.Random(problem.target.seed),
                advance=advance,
            )
        if not goal.met(best.state):
            raise PlanError("method 'evopress' drew no state that meets the goal: remove fewer")
        return Chosen(
            state=best.state,
            block_tokens=objective.spent,
            kl=objective.memo[best.state],
        )
