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

from pdtrim.errors import PlanError
from pdtrim.methods.base import Found, Method
from pdtrim.methods.problem import Problem, Target
from pdtrim.models.swap import Blocks, joined
from pdtrim.plan import STAGES, Gates, Widths
from pdtrim.repair.apply import Repaired, best_repair
from pdtrim.repair.cuts import writes
from pdtrim.search.anneal import Annealing, anneal
from pdtrim.search.evolution import Evolution, evolution
from pdtrim.search.goal import SEARCH_ORDER, Goal
from pdtrim.search.greedy import greedy, greedy_evaluations
from pdtrim.search.hybrid import Hybrid, hybrid
from pdtrim.search.objective import Measured, Objective
from pdtrim.search.one_shot import one_shot
from pdtrim.search.state import Removal
from pdtrim.stage.forward import Pair, Trimmed


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
    repairs = ("none", "best")
    shortlist: int | None = 10
    annealing: Annealing = field(default_factory=Annealing)
    evolution: Evolution = field(default_factory=Evolution)
    hybrid: Hybrid = field(default_factory=Hybrid)
    finalists: int = 4
    repaired: int = 2

    def solve(self, problem: Problem) -> Found:
        """See the module's docstring."""
        target, dense = problem.target, problem.dense()
        ground = self.ground(problem)
        if ground.widths is None and ground.goal.met(dense):
            return Found(gates=dense.gates.without_dead_work(), block_tokens=0)
        start = replace(
            Trimmed.whole(ground.pair, Gates.dense(problem.model.num_layers)), policy=problem.policy
        )
        objective = problem.objective(start=start)
        objective.spent += ground.block_tokens
        best = self.explore(problem, objective, ground.goal)
        if not ground.goal.met(best.state):
            raise PlanError(f"no state was found that saves this much in {target.metric}")
        ranked, spent = self._rerank(problem, objective, ground.goal, best.state)
        state, repaired = ranked[0], None
        if target.repair != "none":
            state, repaired = self._repair(problem, ranked, objective.start)
        gates = state.gates.without_dead_work()
        widths, blocks = ground.under(gates)
        return Found(
            gates=gates,
            block_tokens=objective.spent + spent,
            kl=objective.memo[state],
            repair=repaired.text if repaired else "none",
            widths=widths,
            blocks=joined(blocks, repaired.blocks) if repaired else blocks,
        )

    def ground(self, problem: Problem) -> Ground:
        """What the search starts from; a hybrid narrows the blocks first."""
        return Ground(pair=Pair.dense(problem.model), goal=problem.goal)

    def explore(self, problem: Problem, objective: Objective, goal: Goal) -> Measured:
        """The best state that a search meets; a hybrid begins it elsewhere.

        Args:
            goal: what is still to be removed.
        """
        target, dense = problem.target, problem.dense()
        rng = random.Random(target.seed)
        steps = self._steps(goal, dense, target)
        with problem.progress(f"searching: {target.search}", steps) as advance:
            start = objective.measure(dense)
            if goal.met(dense):
                return start  # narrowing was enough
            if target.search == "one_shot":
                return one_shot(objective, start, goal, advance=advance)
            if target.search == "evolution":
                return evolution(objective, start, goal, self.evolution, rng=rng, advance=advance)
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

    def _steps(self, goal: Goal, dense: Removal, target: Target) -> int:
        """About how often the search advances its bar."""
        if target.search == "one_shot":
            return dense.num_units * sum(goal.least(stage) > 0 for stage in SEARCH_ORDER)
        if target.search == "evolution":
            return self.evolution.generations
        steps = greedy_evaluations(goal, dense, self.shortlist)
        return steps if target.search == "greedy" else steps + self.annealing.steps

    def _rerank(
        self, problem: Problem, objective: Objective, goal: Goal, best: Removal
    ) -> tuple[list[Removal], int]:
        """Finalists by their loss on search and re-rank text together, and what that cost."""
        complete = [s for s in objective.memo if goal.met(s)]
        finalists = sorted(complete, key=lambda s: objective.memo[s])[: self.finalists]
        text = problem.text
        if len(text.rerank) == 0 or len(finalists) == 1:
            return [best], 0
        second = problem.objective(start=objective.start, text=text.rerank, free=True)
        share = len(text.rerank) / (len(text.rerank) + len(text.search))
        losses: dict[Removal, float] = {}
        with problem.progress("ranking finalists", len(finalists)) as advance:
            for state in finalists:
                again = second.measure(state)
                second.stand_on(again)
                losses[state] = share * again.loss + (1 - share) * objective.memo[state]
                advance(1)
        return sorted(losses, key=lambda s: losses[s]), second.spent

    def _repair(
        self, problem: Problem, ranked: list[Removal], start: Trimmed
    ) -> tuple[Removal, Repaired]:
        """The finalist that is best when repaired, chosen on the re-rank text.

        Fitted to the text that is there for it, or else to the search's. The search's meter does
        not count it: a repair costs a few passes.
        """
        text = problem.text
        if len(text.rerank) == 0:
            raise PlanError("a repair is chosen on the re-rank text, and there is none")
        options = ranked[: self.repaired]
        fit = text.fit if len(text.fit) else text.search
        made: list[tuple[Removal, Repaired]] = []
        with problem.progress("repairing finalists", len(options)) as advance:
            for state in options:
                trimmed = replace(start, gates=state.gates)
                repaired = best_repair(problem.model, trimmed, fit, text.rerank)
                made.append((state, repaired))
                advance(1)
        return min(made, key=lambda pair: pair[1].kl)
