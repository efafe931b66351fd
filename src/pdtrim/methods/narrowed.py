"""What the hybrids share that make blocks narrower before the stage-aware search removes some.

The PDTrim paper (2509.04467) reports its method built into others, without saying how. Here a
method of the literature cuts a part of the smaller of the two stages' shares, the same units in
both stages, as it knows no stages. What each stage must still lose goes in whole blocks of the
narrower model: search, re-ranking and repair are those of method ``pdtrim``, always toward the
dense model.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace

from pdtrim.calibration.batches import Calibration
from pdtrim.errors import PlanError
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.methods.base import Target
from pdtrim.methods.baselines.width import WidthMethod
from pdtrim.methods.goals import goal_of
from pdtrim.methods.pdtrim import Ground, PDTrim
from pdtrim.models.model import Model
from pdtrim.models.narrow import narrow_blocks
from pdtrim.plan import Gates, Stage, Widths
from pdtrim.progress import Progress
from pdtrim.search.goal import Goal
from pdtrim.search.journal import Journal
from pdtrim.stage.cost import block_parameters
from pdtrim.stage.forward import Pair
from pdtrim.stage.replaced import swap_pair


@dataclass(frozen=True, kw_only=True)
class NarrowedPDTrim(PDTrim):
    """Settings are those of ``pdtrim``, and ``narrow``: the part of the share that is narrowed."""

    narrow: float

    @abstractmethod
    def narrower(self) -> WidthMethod:
        """What makes the blocks narrower."""

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
        if target.grain != "block":
            raise PlanError(f"method '{self.name}' removes whole blocks: use --grain block")
        goal = goal_of(target, model, calibration, policy, journal)
        share = self.narrow * min(target.prefill_share, target.decode_share)
        if not share:
            return Ground(pair=Pair.dense(model), goal=goal)
        found = self.narrower().search(
            model,
            calibration,
            Target(
                metric="parameters",
                prefill_share=share,
                decode_share=share,
                mode="unified",
                budget=target.budget,
                repair="none",
            ),
            progress=progress,
            journal=journal,
        )
        assert found.widths is not None
        narrow = _narrowed(model, found.widths, "decode")
        pair = Pair.dense(narrow)
        if found.widths.prefill != found.widths.decode:
            pair = replace(pair, prefill=_narrowed(model, found.widths, "prefill"))
        return Ground(
            pair=swap_pair(pair, found.blocks),
            goal=_rest(goal, goal_of(target, narrow, calibration, policy), model, narrow, policy),
            widths=found.widths,
            blocks=found.blocks,
            block_tokens=found.block_tokens,
        )


def _narrowed(model: Model, widths: Widths, stage: Stage) -> Model:
    by_layer = enumerate(widths.of(stage))
    return narrow_blocks(model, {i: width for i, width in by_layer if width is not None})


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
