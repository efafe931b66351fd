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

from pdtrim.calibration.batches import Calibration
from pdtrim.errors import PlanError
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.methods.base import Found, Method, Target
from pdtrim.methods.goals import goal_of
from pdtrim.methods.sets import similarity
from pdtrim.models.model import Model
from pdtrim.plan import Stage
from pdtrim.progress import Progress
from pdtrim.search.anneal import Annealing, anneal
from pdtrim.search.goal import SEARCH_ORDER, Goal
from pdtrim.search.journal import Journal
from pdtrim.search.kv_budget import KV_SEQUENCES, resolve_policy
from pdtrim.search.objective import (
    BudgetSpent,
    Measured,
    Objective,
    cosine_loss,
)
from pdtrim.search.state import Removal


@dataclass(frozen=True, kw_only=True)
class Paper(Method):
    """Settings: size of the pruning set over the count removed, and the annealing."""

    name = "paper"
    default_mode = "subset"
    spread: float = 2.0
    annealing: Annealing = field(default_factory=lambda: Annealing(steps=40))

    def search(
        self,
        model: Model,
        calibration: Calibration,
        target: Target,
        *,
        progress: Progress,
        journal: Journal | None,
    ) -> Found:
        """See the module's docstring."""
        if target.mode != "subset":
            raise PlanError("method 'paper' knows mode 'subset' only: use --mode subset")
        if target.metric not in ("blocks", "parameters") or target.grain != "block":
            raise PlanError("method 'paper' counts whole blocks only: use method 'pdtrim'")
        sample = calibration.search[:KV_SEQUENCES]
        rules = resolve_policy(
            target.kv,
            model,
            sample,
            block_size=target.block_size,
            progress=progress,
            journal=journal,
        )
        objective = Objective(
            model, calibration.search, loss=cosine_loss, budget=target.budget, journal=journal
        )
        policy = HandoverPolicy(rules=rules, block_size=target.block_size)
        goal = goal_of(target, model, calibration, policy)
        if goal.least("prefill") > goal.least("decode"):
            raise PlanError("method 'paper': prefill cannot lose more blocks than decode")
        rng = random.Random(target.seed)
        try:
            current = objective.measure(Removal(num_layers=model.num_layers, mode="subset"))
            for stage in SEARCH_ORDER:
                current = self._prune(objective, current, goal, stage, rng, progress)
        except BudgetSpent as error:
            raise PlanError(
                f"a budget of {target.budget} block-tokens does not reach the end of the iterative"
                " removal: give more, or less calibration text"
            ) from error
        return Found(gates=current.state.gates, kv=rules, block_tokens=objective.spent)

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
