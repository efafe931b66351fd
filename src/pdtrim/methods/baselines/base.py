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
from dataclasses import dataclass, replace
from typing import ClassVar

from pdtrim.calibration.batches import Calibration
from pdtrim.errors import PlanError
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.methods.base import Found, Method, Target
from pdtrim.methods.baselines.orders import dense_state
from pdtrim.methods.goals import goal_of
from pdtrim.models.model import Model
from pdtrim.plan import Mode
from pdtrim.progress import Progress
from pdtrim.search.goal import Goal
from pdtrim.search.journal import Journal
from pdtrim.search.kv_budget import KV_SEQUENCES, resolve_policy
from pdtrim.search.objective import BudgetSpent
from pdtrim.search.state import Grain, Removal
from pdtrim.stage.forward import Batch


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
    """A method of the literature. Subclasses implement :meth:`choose`.

    Attributes:
        modes, grains: what the method knows. A target's grain ``block`` is also what no choice
            looks like, so a method that knows ``part`` only takes that.
    """

    default_mode = "unified"
    modes: ClassVar[tuple[Mode, ...]] = ("unified", "subset", "projected")
    grains: ClassVar[tuple[Grain, ...]] = ("block",)
    paper_calibration: ClassVar[PaperCalibration]

    @abstractmethod
    def choose(
        self,
        model: Model,
        batch: Batch,
        target: Target,
        goal: Goal,
        *,
        progress: Progress,
        journal: Journal | None,
    ) -> Chosen:
        """The state that meets the goal; the target's grain is the method's.

        Raises:
            BudgetSpent: the target's budget does not suffice.
        """

    def search(
        self,
        model: Model,
        calibration: Calibration,
        target: Target,
        *,
        progress: Progress,
        journal: Journal | None,
    ) -> Found:
        """Check the target, rank, and resolve the KV policy."""
        target = self._own(target)
        rules = resolve_policy(
            target.kv,
            model,
            calibration.search[:KV_SEQUENCES],
            block_size=target.block_size,
            progress=progress,
            journal=journal,
        )
        policy = HandoverPolicy(rules=rules, block_size=target.block_size)
        goal = goal_of(target, model, calibration, policy)
        state = dense_state(model, target)
        chosen = Chosen(state=state, block_tokens=0)
        if not goal.met(state):
            batch = calibration.search.to(model.device)
            try:
                chosen = self.choose(model, batch, target, goal, progress=progress, journal=journal)
            except BudgetSpent as error:
                raise PlanError(
                    f"a budget of {target.budget} block-tokens does not reach the end of method"
                    f" '{self.name}': give more, fewer blocks to remove, or less calibration text"
                ) from error
        if not goal.met(chosen.state):
            raise PlanError(
                f"method '{self.name}' finds no units in mode '{target.mode}' that save what both"
                " stages must: ask for less of prefill, or use --mode unified"
            )
        return Found(
            gates=chosen.state.gates.without_dead_work(),
            kv=rules,
            block_tokens=chosen.block_tokens,
            kl=chosen.kl,
        )

    def _own(self, target: Target) -> Target:
        """The target with the method's grain, or the reason why it is refused."""
        if target.mode not in self.modes:
            raise PlanError(
                f"method '{self.name}' cannot rank a block for one stage alone: use --mode"
                f" {' or '.join(self.modes)}"
            )
        if target.metric not in ("blocks", "parameters"):
            raise PlanError(
                f"method '{self.name}' counts blocks or parameters: use --metric blocks or"
                " parameters"
            )
        if target.repair != "none":
            raise PlanError(f"method '{self.name}' repairs nothing: use method 'pdtrim'")
        if target.grain in self.grains:
            return target
        if target.grain == "part":
            raise PlanError(f"method '{self.name}' removes whole blocks: use --grain block")
        return replace(target, grain=self.grains[0])
