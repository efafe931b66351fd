"""``llm-pruner+pdtrim``: LLM-Pruner makes the blocks narrower, the search removes some of them.

The PDTrim paper (2509.04467) reports its method built into others, without saying how. Here half of
the smaller of the two stages' shares is cut by LLM-Pruner's units (2305.11627), the same in both
stages, as it knows no stages. What each stage must still lose goes in whole blocks of the narrower
model: search, re-ranking and repair are those of method ``pdtrim``, always toward the dense model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pdtrim.calibration.batches import Calibration
from pdtrim.errors import PlanError
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.methods.base import Target
from pdtrim.methods.baselines.llm_pruner import LLMPruner
from pdtrim.methods.goals import goal_of
from pdtrim.methods.pdtrim import Ground, PDTrim
from pdtrim.models.model import Model
from pdtrim.models.narrow import narrow_blocks
from pdtrim.plan import Gates
from pdtrim.progress import Progress
from pdtrim.search.goal import Goal
from pdtrim.search.journal import Journal
from pdtrim.stage.cost import block_parameters
from pdtrim.stage.forward import Pair


@dataclass(frozen=True, kw_only=True)
class LLMPrunerPDTrim(PDTrim):
    """Settings are those of ``pdtrim``, and ``narrow``: what LLM-Pruner takes of the share."""

    name = "llm-pruner+pdtrim"
    narrow: float = 0.5

    def ground(
        self,
        model: Model,
        calibration: Calibration,
        target: Target,
        policy: HandoverPolicy,
        *,
        progress: Progress,
        journal: Journal | None,
    ) -> Ground:
        """Narrow the blocks, and see what must still go."""
        if target.metric != "parameters":
            raise PlanError(
                f"method '{self.name}' cuts shares of the parameters: use --metric parameters"
            )
        goal = goal_of(target, model, calibration, policy, journal)
        share = self.narrow * min(target.prefill_share, target.decode_share)
        if not share:
            return Ground(pair=Pair.dense(model), goal=goal)
        found = LLMPruner().search(
            model,
            calibration,
            Target(
                metric="parameters",
                prefill_share=share,
                decode_share=share,
                mode="unified",
                budget=target.budget,
            ),
            progress=progress,
            journal=journal,
        )
        assert found.widths is not None
        widths = {i: width for i, width in enumerate(found.widths.decode) if width is not None}
        narrow = narrow_blocks(model, widths)
        return Ground(
            pair=Pair.dense(narrow),
            goal=_rest(goal, goal_of(target, narrow, calibration, policy), model, narrow, policy),
            widths=found.widths,
            block_tokens=found.block_tokens,
        )


def _rest(whole: Goal, units: Goal, model: Model, narrow: Model, policy: HandoverPolicy) -> Goal:
    """What the dense model must lose, less what narrowing has saved, in the narrow blocks.

    Args:
        whole, units: the target's goal on the dense and on the narrow model.
    """
    gates = Gates.dense(model.num_layers).without_dead_work()
    before = block_parameters(model, gates, policy.rules)
    after = block_parameters(narrow, gates, policy.rules)
    saved = {stage: before[stage] - after[stage] for stage in before}
    return replace(
        units,
        prefill_needed=max(whole.prefill_needed - saved["prefill"], 0.0),
        decode_needed=max(whole.decode_needed - saved["decode"], 0.0),
    )
