"""``pdtrim``: the default method. A hybrid search, or another, on KL of the real objective.

The loss is the mean KL to the dense model on continuation tokens under prefill/decode inference,
with the KV policy in place: what a user of the pair sees, and what no baseline optimises. Greedy
prunes decode first because it is the sensitive stage; prefill's greedy then knows decode's losses,
and what follows changes both stages together. The best states are ranked again on text that the
search has not seen.

In mode ``projected`` a block that prefill skips still gives decode its keys and values, computed
from the stream that reaches it (POP, 2602.03295, skips the last third so; here any block may go).
Prefill work that nothing reads is then removed; it changes nothing.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from pdtrim.calibration.batches import Calibration
from pdtrim.errors import PlanError
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.methods.base import Found, Method, Target
from pdtrim.methods.goals import goal_of
from pdtrim.models.model import Model
from pdtrim.models.replace import Blocks
from pdtrim.plan import STAGES, Gates, Widths
from pdtrim.progress import Progress
from pdtrim.repair.apply import Repaired, best_repair
from pdtrim.repair.cuts import writes
from pdtrim.search.anneal import Annealing, anneal
from pdtrim.search.evolution import Evolution, evolution
from pdtrim.search.goal import SEARCH_ORDER, Goal
from pdtrim.search.greedy import greedy, greedy_evaluations
from pdtrim.search.hybrid import Hybrid, hybrid
from pdtrim.search.journal import Journal
from pdtrim.search.kv_budget import KV_SEQUENCES, resolve_policy
from pdtrim.search.objective import BudgetSpent, Measured, Objective
from pdtrim.search.one_shot import one_shot
from pdtrim.search.state import Removal
from pdtrim.stage.forward import Pair


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What a search starts from: the dense model in both stages, or a pair already narrowed.

    Attributes:
        goal: what is still to be removed.
        blocks: biases of narrower blocks, which ``pair`` has in place.
        block_tokens: what narrowing has cost.
    """

    pair: Pair
    goal: Goal
    widths: Widths | None = None
    blocks: Blocks = field(default_factory=dict)
    block_tokens: int = 0

    def under(self, gates: Gates) -> tuple[Widths | None, Blocks]:
        """The widths and the biases that a pair under these gates needs: none where it skips."""
        if self.widths is None:
            return None, self.blocks
        blocks: Blocks = {}
        widths = {}
        for stage in STAGES:
            runs = writes(gates, stage)
            biases = self.blocks.get(stage, {})
            blocks[stage] = {layer: biases[layer] for layer in biases if runs[layer]}
            widths[stage] = tuple(
                width and width.model_copy(update={"biased": layer in blocks[stage]})
                for layer, width in enumerate(self.widths.of(stage))
            )
        return Widths(**widths), blocks


@dataclass(frozen=True, kw_only=True)
class PDTrim(Method):
    """Settings: candidates a greedy step re-measures, the searches, finalists of the re-ranking.

    ``repaired`` of the finalists are repaired, if the target asks for it, and the best then wins.

    ``annealing`` holds for the searches ``anneal`` and ``hybrid``.
    """

    name = "pdtrim"
    default_repair = "best"
    shortlist: int | None = 10
    annealing: Annealing = field(default_factory=Annealing)
    evolution: Evolution = field(default_factory=Evolution)
    hybrid: Hybrid = field(default_factory=Hybrid)
    finalists: int = 4
    repaired: int = 2

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
        sample = calibration.search[:KV_SEQUENCES]
        rules = resolve_policy(
            target.kv,
            model,
            sample,
            block_size=target.block_size,
            progress=progress,
            journal=journal,
        )
        policy = HandoverPolicy(rules=rules, block_size=target.block_size)
        ground = self.ground(model, calibration, target, policy, progress=progress, journal=journal)
        dense = Removal(num_layers=model.num_layers, mode=target.mode, grain=target.grain)
        untouched = ground.widths is None and ground.goal.met(dense)
        if untouched:
            return Found(gates=dense.gates.without_dead_work(), kv=rules, block_tokens=0)
        objective = Objective(
            model,
            calibration.search,
            pair=ground.pair,
            policy=policy,
            budget=target.budget,
            journal=journal,
        )
        objective.spent += ground.block_tokens
        best = self.explore(objective, dense, ground.goal, target, progress)
        if not ground.goal.met(best.state):
            raise PlanError(f"no state was found that saves this much in {target.metric}")
        ranked, spent = self._rerank(calibration, objective, ground.goal, best.state, progress)
        state, repaired = ranked[0], None
        if target.repair != "none":
            state, repaired = self._repair(ranked, calibration, objective, progress)
        gates = state.gates.without_dead_work()
        widths, blocks = ground.under(gates)
        return Found(
            gates=gates,
            kv=rules,
            block_tokens=objective.spent + spent,
            kl=objective.memo[state],
            repair=repaired.text if repaired else "none",
            widths=widths,
            blocks=_joined(blocks, repaired.blocks) if repaired else blocks,
        )

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
        """What the search starts from; a hybrid narrows the blocks first."""
        del progress
        goal = goal_of(target, model, calibration, policy, journal)
        return Ground(pair=Pair.dense(model), goal=goal)

    def explore(
        self,
        objective: Objective,
        dense: Removal,
        goal: Goal,
        target: Target,
        progress: Progress,
    ) -> Measured:
        """The best state that a search meets; a hybrid begins it elsewhere.

        Raises:
            PlanError: the budget does not reach the end of the first phase.
        """
        rng = random.Random(target.seed)
        with progress(f"searching: {target.search}", self._steps(goal, dense, target)) as advance:
            try:
                start = objective.measure(dense)
                if goal.met(dense):
                    return start  # narrowing was enough
                if target.search == "one_shot":
                    return one_shot(objective, start, goal, advance=advance)
                if target.search == "evolution":
                    return evolution(
                        objective, start, goal, self.evolution, rng=rng, advance=advance
                    )
                if target.search == "hybrid":
                    return hybrid(
                        objective,
                        start,
                        goal,
                        replace(self.hybrid, annealing=self.annealing),
                        rng=rng,
                        shortlist=self.shortlist,
                        advance=advance,
                    )
                seed = greedy(objective, start, goal, shortlist=self.shortlist, advance=advance)
                if target.search == "greedy":
                    return seed
                return anneal(objective, seed, goal, self.annealing, rng=rng, advance=advance)
            except BudgetSpent as error:
                raise PlanError(
                    f"a budget of {target.budget} block-tokens does not reach the end of the"
                    f" {target.search} search's first phase: give more, fewer blocks to remove, or"
                    " less calibration text"
                ) from error

    def _steps(self, goal: Goal, dense: Removal, target: Target) -> int:
        """About how often the search advances its bar."""
        if target.search == "one_shot":
            return dense.num_units * sum(goal.least(stage) > 0 for stage in SEARCH_ORDER)
        if target.search == "evolution":
            return self.evolution.generations
        steps = greedy_evaluations(goal, dense, self.shortlist)
        return steps if target.search == "greedy" else steps + self.annealing.steps

    def _rerank(
        self,
        calibration: Calibration,
        objective: Objective,
        goal: Goal,
        best: Removal,
        progress: Progress,
    ) -> tuple[list[Removal], int]:
        """Finalists by their loss on search and re-rank text together, and what that cost."""
        complete = [s for s in objective.memo if goal.met(s)]
        finalists = sorted(complete, key=lambda s: objective.memo[s])[: self.finalists]
        if len(calibration.rerank) == 0 or len(finalists) == 1:
            return [best], 0
        second = Objective(
            objective.model,
            calibration.rerank,
            pair=objective.pair,
            policy=objective.policy,
            journal=objective.journal,
        )
        share = len(calibration.rerank) / (len(calibration.rerank) + len(calibration.search))
        losses: dict[Removal, float] = {}
        with progress("ranking finalists", len(finalists)) as advance:
            for state in finalists:
                again = second.measure(state)
                second.stand_on(again)
                losses[state] = share * again.loss + (1 - share) * objective.memo[state]
                advance(1)
        return sorted(losses, key=lambda s: losses[s]), second.spent

    def _repair(
        self,
        ranked: list[Removal],
        calibration: Calibration,
        objective: Objective,
        progress: Progress,
    ) -> tuple[Removal, Repaired]:
        """The finalist that is best when repaired, chosen on the re-rank text.

        Fitted to the text that is there for it, or else to the search's. The search's meter does
        not count it: a repair costs a few passes.
        """
        if len(calibration.rerank) == 0:
            raise PlanError("a repair is chosen on the re-rank text, and there is none")
        options = ranked[: self.repaired]
        fit = calibration.fit if len(calibration.fit) else calibration.search
        made: list[tuple[Removal, Repaired]] = []
        with progress("repairing finalists", len(options)) as advance:
            for state in options:
                repaired = best_repair(
                    objective.model,
                    state.gates.without_dead_work(),
                    objective.policy,
                    fit,
                    calibration.rerank,
                    pair=objective.pair,
                )
                made.append((state, repaired))
                advance(1)
        return min(made, key=lambda pair: pair[1].kl)


def _joined(below: Blocks, above: Blocks) -> Blocks:
    """Parameters of both, those of ``above`` where both have them."""
    joined: Blocks = {}
    for stage in STAGES:
        old, new = below.get(stage, {}), above.get(stage, {})
        joined[stage] = {i: {**old.get(i, {}), **new.get(i, {})} for i in sorted({*old, *new})}
    return joined
