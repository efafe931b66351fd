"""``paper``: the method of PDTrim (arXiv 2509.04467, v1 to v3), reconstructed.

What is known, from the abstract and the public reviews: redundancy of a block is the cosine
similarity of its input and output; blocks are assigned to a pruning set (and a distillation set);
blocks are removed iteratively with simulated annealing, for prefill and decode separately;
prefill's removed set lies inside decode's, so that each layer kept in decode finds prompt KV; in
layers where attention concentrates on the first and last tokens, only their KV is sent.

What is reconstruction, as the paper's text was not to be had: the pruning set is the most redundant
blocks, ``spread`` times as many as are to be removed; removal takes the most redundant block of the
set, measured anew in the pruned stream after each removal; the annealing then swaps blocks inside
the set to bring the last stream of decode closest (cosine) to the dense model's. Redundancy is
averaged over prompt tokens for prefill and over continuation tokens for decode. The temperature
schedule is that of ``search/anneal.py``. Removal is from both sets; which removed blocks then merge
with a neighbour is the rule of ``sets.py``, and ``training.py`` fits them. The paper calibrates on
PIQA and MMLU, which it also reports; here the text is the user's.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from pdtrim.distill.sets import similarity
from pdtrim.errors import PlanError
from pdtrim.methods.base import Found, Method, Split
from pdtrim.methods.problem import Problem
from pdtrim.plan import Stage
from pdtrim.progress import Progress
from pdtrim.search.anneal import Annealing, anneal
from pdtrim.search.goal import SEARCH_ORDER, Goal
from pdtrim.search.objective import (
    Measured,
    Objective,
    cosine_loss,
)


@dataclass(frozen=True, kw_only=True)
class Paper(Method):
    """Settings: size of the pruning set over the count removed, and the annealing."""

    name = "paper"
    default_mode = "subset"
    modes = ("subset",)
    grains = ("block",)
    metrics = ("blocks", "parameters")
    splits = (Split(name="", mode="subset", prefill=2 / 3, decode=4 / 3),)
    spread: float = 2.0
    annealing: Annealing = field(default_factory=lambda: Annealing(steps=40))

    def solve(self, problem: Problem) -> Found:
        """See the module's docstring."""
        objective, goal = problem.objective(loss=cosine_loss), problem.goal
        if goal.least("prefill") > goal.least("decode"):
            raise PlanError("method 'paper': prefill cannot lose more blocks than decode")
        rng = random.Random(problem.target.seed)
        current = objective.measure(problem.dense())
        for stage in SEARCH_ORDER:
            current = self._prune(objective, current, goal, stage, rng, problem.progress)
        return Found(gates=current.state.gates, block_tokens=objective.spent)

    def _prune(
        self,
        objective: Objective,
        current: Measured,
        goal: Goal,
        stage: Stage,
        rng: random.Random,
        progress: Progress,
    ) -> Measured:
        count = goal.least(stage)
        if count == 0:
            return current
        pruning_set = self._pruning_set(current, stage, count)
        with progress(f"removing {stage} blocks", count + self.annealing.steps) as advance:
            for _ in range(count):
                objective.stand_on(current)
                redundancy_L = similarity(current.traces, stage)
                open_blocks = [i for i in current.state.removable(stage) if i in pruning_set]
                layer = max(open_blocks, key=lambda i: float(redundancy_L[i]))
                current = objective.measure(current.state.remove(stage, layer))
                advance(1)
            return anneal(
                objective,
                current,
                goal,
                self.annealing,
                rng=rng,
                allowed=pruning_set,
                stages=(stage,),
                advance=advance,
            )

    def _pruning_set(self, current: Measured, stage: Stage, count: int) -> frozenset[int]:
        redundancy_L = similarity(current.traces, stage)
        ranked = sorted(
            current.state.removable(stage), key=lambda i: float(redundancy_L[i]), reverse=True
        )
        return frozenset(ranked[: max(count, round(self.spread * count))])
