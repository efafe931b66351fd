"""``pdtrim``: the default method. Greedy seed, then annealed swaps, on KL of the real objective.

The loss is the mean KL to the dense model on continuation tokens under prefill/decode inference,
with the KV policy in place: what a user of the pair sees, and what no baseline optimises. Decode is
pruned first because it is the sensitive stage; prefill's greedy then knows decode's losses, and the
annealing swaps blocks of both stages together. The best states are ranked again on text that the
search has not seen.

In mode ``projected`` a block that prefill skips still gives decode its keys and values, computed
from the stream that reaches it (POP, 2602.03295, skips the last third so; here any block may go).
Prefill work that nothing reads is then removed; it changes nothing.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from pdtrim.calibration.batches import Calibration
from pdtrim.errors import PlanError
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.methods.base import SEARCH_ORDER, Found, Method, Target
from pdtrim.models.model import Model
from pdtrim.progress import Progress
from pdtrim.search.anneal import Annealing, anneal
from pdtrim.search.greedy import greedy, greedy_evaluations
from pdtrim.search.kv_budget import KV_SEQUENCES, resolve_policy
from pdtrim.search.objective import BudgetSpent, Measured, Objective
from pdtrim.search.state import Removal


@dataclass(frozen=True, kw_only=True)
class PDTrim(Method):
    """Settings: candidates a greedy step re-measures, annealing, finalists of the re-ranking."""

    name = "pdtrim"
    shortlist: int | None = 10
    annealing: Annealing = field(default_factory=Annealing)
    finalists: int = 4

    def search(
        self, model: Model, calibration: Calibration, target: Target, *, progress: Progress
    ) -> Found:
        """See the module's docstring."""
        sample = calibration.search[:KV_SEQUENCES]
        rules = resolve_policy(
            target.kv, model, sample, block_size=target.block_size, progress=progress
        )
        policy = HandoverPolicy(rules=rules, block_size=target.block_size)
        objective = Objective(model, calibration.search, policy=policy, budget=target.budget)
        start = objective.measure(Removal(num_layers=model.num_layers, mode=target.mode))
        if target.prefill_remove + target.decode_remove == 0:
            return Found(gates=start.state.gates.without_dead_work(), kv=rules, block_tokens=0)
        seed = self._greedy(objective, start, target, progress)
        with progress("annealing", self.annealing.steps) as advance:
            rng = random.Random(target.seed)
            best = anneal(objective, seed, self.annealing, rng=rng, advance=advance)
        state, spent = self._rerank(model, calibration, policy, objective, best.state, progress)
        return Found(
            gates=state.gates.without_dead_work(),
            kv=rules,
            block_tokens=objective.spent + spent,
            kl=objective.memo[state],
        )

    def _greedy(
        self, objective: Objective, start: Measured, target: Target, progress: Progress
    ) -> Measured:
        current = start
        try:
            for stage in SEARCH_ORDER:
                total = greedy_evaluations(start.state, target.remove(stage), self.shortlist)
                with progress(f"removing {stage} blocks", total) as advance:
                    current = greedy(
                        objective,
                        current,
                        stage,
                        target.remove(stage),
                        shortlist=self.shortlist,
                        advance=advance,
                    )
        except BudgetSpent as error:
            raise PlanError(
                f"a budget of {target.budget} block-tokens does not reach the end of the greedy"
                " search: give more, fewer blocks to remove, or less calibration text"
            ) from error
        return current

    def _rerank(
        self,
        model: Model,
        calibration: Calibration,
        policy: HandoverPolicy,
        objective: Objective,
        best: Removal,
        progress: Progress,
    ) -> tuple[Removal, int]:
        """The best of the finalists on search and re-rank text together, and what that cost."""
        sizes = len(best.prefill), len(best.decode)
        complete = [s for s in objective.memo if (len(s.prefill), len(s.decode)) == sizes]
        finalists = sorted(complete, key=lambda s: objective.memo[s])[: self.finalists]
        if len(calibration.rerank) == 0 or len(finalists) == 1:
            return best, 0
        second = Objective(model, calibration.rerank, policy=policy)
        share = len(calibration.rerank) / (len(calibration.rerank) + len(calibration.search))
        losses: dict[Removal, float] = {}
        with progress("ranking finalists", len(finalists)) as advance:
            for state in finalists:
                again = second.measure(state)
                second.stand_on(again)
                losses[state] = share * again.loss + (1 - share) * objective.memo[state]
                advance(1)
        return min(losses, key=lambda s: losses[s]), second.spent
