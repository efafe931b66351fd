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

from pdtrim.methods.baselines.width import WidthMethod
from pdtrim.methods.pdtrim import TILTED, Ground, PDTrim
from pdtrim.methods.problem import Problem, Target
from pdtrim.models.model import Model
from pdtrim.models.narrow import narrow_blocks
from pdtrim.plan import Gates, Stage, Widths
from pdtrim.search.goal import Goal
from pdtrim.stage.cost import block_parameters
from pdtrim.stage.forward import Pair
from pdtrim.stage.swap import swap_pair


@dataclass(frozen=True, kw_only=True)
class NarrowedPDTrim(PDTrim):
    """Settings are those of ``pdtrim``, and ``narrow``: the part of the share that is narrowed."""

    grains = ("block",)
    metrics = ("parameters",)
    splits = (TILTED,)
    narrow: float

    @abstractmethod
    def narrower(self) -> WidthMethod:
        """What makes the blocks narrower."""

    def ground(self, problem: Problem) -> Ground:
        """Narrow the blocks, and see what must still go."""
        model, target, goal = problem.model, problem.target, problem.goal
        share = self.narrow * min(target.prefill_share, target.decode_share)
        if not share:
            return Ground(pair=Pair.dense(model), goal=goal)
        part = Target(
            metric="parameters",
            prefill_share=share,
            decode_share=share,
            mode="unified",
            budget=target.budget,
        )
        method = self.narrower()
        found = method.solved(replace(problem, target=method.own(part)))
        assert found.widths is not None
        narrow = _narrowed(model, found.widths, "decode")
        pair = Pair.dense(narrow)
        if found.widths.prefill != found.widths.decode:
            pair = replace(pair, prefill=_narrowed(model, found.widths, "prefill"))
        return Ground(
            pair=swap_pair(pair, found.blocks),
            goal=_rest(problem, problem.narrower(narrow), share),
            widths=found.widths,
            blocks=found.blocks,
            block_tokens=found.block_tokens,
        )


def _narrowed(model: Model, widths: Widths, stage: Stage) -> Model:
    by_layer = enumerate(widths.of(stage))
    return narrow_blocks(model, {i: width for i, width in by_layer if width is not None})


def _rest(whole: Problem, narrow: Problem, share: float) -> Goal:
    """What the dense model must lose, less what narrowing has saved, in the narrow blocks.

    A stage that was to lose no more than the narrowed share needs nothing else. Narrow blocks meet
    decode's share; prefill, which does not run all of its last block, may miss it by a little, and
    a block more would exceed it by far.
    """
    gates, rules = Gates.dense(whole.model.num_layers).without_dead_work(), whole.rules
    before = block_parameters(whole.model, gates, rules)
    after = block_parameters(narrow.model, gates, rules)
    target, goal = whole.target, whole.goal
    prefill = goal.prefill_needed - before["prefill"] + after["prefill"]
    decode = goal.decode_needed - before["decode"] + after["decode"]
    return replace(
        narrow.goal,
        prefill_needed=max(prefill, 0.0) if target.prefill_share > share else 0.0,
        decode_needed=max(decode, 0.0) if target.decode_share > share else 0.0,
    )
