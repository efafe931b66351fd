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
from pdtrim.methods.base import Target
from pdtrim.methods.baselines.shortgpt import ShortGPT
from pdtrim.methods.pdtrim import PDTrim
from pdtrim.progress import Progress
from pdtrim.search.anneal import Annealing, anneal
from pdtrim.search.goal import Goal
from pdtrim.search.objective import BudgetSpent, Measured, Objective
from pdtrim.search.state import Removal
from pdtrim.stage.forward import Batch


@dataclass(frozen=True, kw_only=True)
class ShortGPTPDTrim(PDTrim):
    """Settings are those of ``pdtrim``; annealing takes more steps, as nothing comes before it."""

    name = "shortgpt+pdtrim"
    annealing: Annealing = field(default_factory=lambda: Annealing(steps=160))

    def explore(
        self,
        objective: Objective,
        dense: Removal,
        goal: Goal,
        target: Target,
        progress: Progress,
    ) -> Measured:
        """See the module's docstring."""
        if target.search not in ("hybrid", "anneal") or target.grain != "block":
            raise PlanError(
                f"method '{self.name}' anneals whole blocks from ShortGPT's choice: use --search"
                " anneal and --grain block"
            )
        try:
            ranked = ShortGPT().choose(
                objective.model,
                Batch.join(objective.batches),
                target,
                goal,
                progress=progress,
                journal=None,
            )
            objective.spent += ranked.block_tokens
            start = objective.measure(ranked.state)
        except BudgetSpent as error:
            raise PlanError(
                f"a budget of {target.budget} block-tokens does not pay ShortGPT's ranking: give"
                " more, or less calibration text"
            ) from error
        with progress("annealing from ShortGPT's choice", self.annealing.steps) as advance:
            rng = random.Random(target.seed)
            return anneal(objective, start, goal, self.annealing, rng=rng, advance=advance)
