"""``pdtrim``: the default method. A hybrid search, or another, on KL of the real objective.

The loss is the mean KL to the dense model on continuation tokens under prefill/decode inference,
with the KV policy in place: what a user of the pair sees, and what no baseline optimises. Greedy
prunes decode first because it is the sensitive stage; prefill's greedy then knows decode's losses,
and what follows changes both stages together. The best states are ranked again on text that the
search has not seen.

In mode ``projected`` a block that prefill skips still gives decode its keys and values, computed
from the stream that reaches it (POP, 2602.03295, skips the last third so; here any block may go).
Prefill work that nothing reads is then removed; it changes nothing.

A repair changes the order of states: keys and values of prefill's last blocks, all read off one
stream, lose much as they are cut and are fitted well (SwiftKV, 2410.03960, trains them). So where
repairs follow, the search measures states with these fits in place (``repair/ahead.py``), and
beside the finalists the best state is repaired with prefill's last blocks gone in place of those
that were found.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from pdtrim.errors import PlanError
from pdtrim.methods.base import Found, Method, Split
from pdtrim.methods.pace import measured_pace, minutes
from pdtrim.methods.problem import Problem, Target
from pdtrim.models.swap import Blocks, joined
from pdtrim.plan import STAGES, Gates, Stage, Widths
from pdtrim.repair.ahead import Ahead
from pdtrim.repair.apply import (
    KINDS,
    KV_RIDGE,
    Kind,
    Repaired,
    best_repair,
    changed_stages,
)
from pdtrim.repair.cuts import writes
from pdtrim.repair.dense import DenseText
from pdtrim.repair.held_out import HeldOut
from pdtrim.search.anneal import Annealing, anneal
from pdtrim.search.evolution import Evolution, evolution
from pdtrim.search.goal import SEARCH_ORDER, Goal
from pdtrim.search.greedy import greedy, greedy_evaluations
from pdtrim.search.hybrid import Hybrid, hybrid
from pdtrim.search.objective import BudgetSpent, Measured, Objective
from pdtrim.search.one_shot import one_shot
from pdtrim.search.state import Removal
from pdtrim.stage.forward import Pair, Trimmed

STEP = 0.35
"""Of a dense pass, a greedy step's evaluation: candidates run from where they differ, and most of
them on part of the text."""
TILTED = Split(name="-tilted", mode="projected", prefill=1.5, decode=0.5)
"""More from prefill, the stage that bears it."""
SEARCH_SHARE = 0.8
"""Of the minutes behind repairs, that the search plans with; the rest is for a slower machine."""


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

    ``repaired`` of the finalists are repaired, if the target asks for it, and the state without
    prefill's last blocks; the best then wins.

    ``annealing`` holds for the searches ``anneal`` and ``hybrid``.
    """

    name = "pdtrim"
    default_repair = "best"
    paced = True
    repairs = ("none", "best")
    splits: ClassVar[tuple[Split, ...]] = (
        Split(name="-even", mode="projected", prefill=1.0, decode=1.0),
        TILTED,
        Split(name="-prefill", mode="projected", prefill=2.0, decode=0.0, below=0.8),
    )
    shortlist: int | None = 10
    annealing: Annealing = field(default_factory=Annealing)
    evolution: Evolution = field(default_factory=Evolution)
    hybrid: Hybrid = field(default_factory=lambda: Hybrid(halving=True))
    finalists: int = 4
    repaired: int = 2

    def solve(self, problem: Problem) -> Found:
        """See the module's docstring."""
        target, dense = problem.target, problem.dense()
        ground = self.ground(problem)
        if ground.widths is None and ground.goal.met(dense):
            return Found(gates=dense.gates.without_dead_work(), block_tokens=0)
        begun = time.monotonic()
        start = replace(
            Trimmed.whole(ground.pair, Gates.dense(problem.model.num_layers)), policy=problem.policy
        )
        objective = problem.objective(
            start=start, recall=True, pair_of=self._fitted_ahead(problem, ground)
        )
        objective.spent += ground.block_tokens
        clock = self._clock(problem, objective, ground.goal, begun)
        best = self.explore(problem, objective, ground.goal)
        if not ground.goal.met(best.state):
            raise PlanError(f"no state was found that saves this much in {target.metric}")
        ranked, spent = self._rerank(problem, objective, ground.goal, best.state)
        state, repaired = ranked[0], None
        if target.repair != "none":
            ranked = ranked[: self.repaired]
            last = without_last(ranked[0], ground.goal)
            if last is not None and last not in ranked and _measured(objective, last):
                ranked.insert(1, last)
            state, repaired = self._repair(problem, ranked, objective.start, clock)
        score = objective.score_of(state)
        gates = state.gates.without_dead_work()
        widths, blocks = ground.under(gates)
        return Found(
            gates=gates,
            block_tokens=objective.spent + spent,
            kl=score.kl,
            recall=score.recall,
            repair=repaired.text if repaired else "none",
            widths=widths,
            blocks=joined(blocks, repaired.blocks) if repaired else blocks,
        )

    def _fitted_ahead(self, problem: Problem, ground: Ground) -> Callable[[Gates], Pair] | None:
        """What measures states with the keys and values that their repair will fit."""
        target = problem.target
        if target.repair == "none" or target.mode != "projected":
            return None
        if not ground.goal.least("prefill"):
            return None
        dense = DenseText(problem.model, problem.text.fitted, stages=("prefill",))
        return Ahead(ground.pair, dense, ridge=KV_RIDGE).pair

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
        second = problem.objective(
            start=objective.start,
            text=text.rerank,
            free=True,
            recall=True,
            pair_of=objective.pair_of,
        )
        share = len(text.rerank) / (len(text.rerank) + len(text.search))
        losses: dict[Removal, float] = {}
        with problem.progress("ranking finalists", len(finalists)) as advance:
            for state in finalists:
                again = second.measure(state)
                second.stand_on(again)
                losses[state] = share * again.loss + (1 - share) * objective.memo[state]
                advance(1)
        return sorted(losses, key=lambda s: losses[s]), second.spent

    def _clock(
        self, problem: Problem, objective: Objective, goal: Goal, begun: float
    ) -> Callable[[], bool]:
        """Say how long it will take, and hold the search to the target's minutes if it has any.

        Returns:
            Whether the minutes are over.
        """
        target = problem.target
        fit = problem.text.fitted
        passes = 0.0
        if target.search in ("hybrid", "anneal"):
            passes = self.annealing.steps * 2 / 3
        pace = measured_pace(problem.model, objective, problem.journal)
        search = (
            STEP * greedy_evaluations(goal, problem.dense(), self.shortlist) + passes
        ) * objective.dense_cost
        repairs = ahead = 0.0
        if target.repair != "none":
            last = objective.pair_of is not None
            repairs = pace.repair_seconds(problem.model, fit, goal, self.repaired + last)
            ahead = pace.ahead_seconds(problem.model, fit, goal) if last else 0.0
        if target.minutes is not None:
            key = {"block_tokens_in": target.minutes}
            spent = time.monotonic() - begun + ahead
            left = SEARCH_SHARE * (60 * target.minutes - spent - repairs)

            def affordable() -> list[int]:
                return [objective.spent + max(int(left / pace.block_token_s), 0)]

            journal = problem.journal
            objective.budget = (journal.once(key, affordable) if journal else affordable())[0]
        if objective.budget is not None:
            search = min(search, objective.budget) if target.minutes is None else objective.budget
        seconds = search * pace.block_token_s + ahead
        problem.say(
            f"about {minutes(seconds + repairs)} from here: {minutes(seconds)} of search,"
            f" {minutes(repairs)} of repairs"
        )
        end = math.inf if target.minutes is None else begun + 60 * target.minutes
        objective.late = lambda: time.monotonic() > end - repairs
        return lambda: time.monotonic() > end

    def _repair(
        self,
        problem: Problem,
        ranked: list[Removal],
        start: Trimmed,
        over: Callable[[], bool],
    ) -> tuple[Removal, Repaired]:
        """The finalist that is best when repaired, chosen on the re-rank text.

        All kinds of repair are tried on the first, on the others the kinds that won there, and in
        mode ``projected`` the fits of keys and values. Fitted to the text that is there for it, or
        else to the search's. The search's meter does not count it: a repair costs a few passes.

        Args:
            over: whether there is no time for another repair.
        """
        text, model = problem.text, problem.model
        if len(text.rerank) == 0:
            raise PlanError("a repair is chosen on the re-rank text, and there is none")
        options = [replace(start, gates=state.gates) for state in ranked]
        changed = [
            stage for stage in STAGES if any(stage in changed_stages(model, o) for o in options)
        ]
        fit = DenseText(model, text.fitted, stages=changed or STAGES)
        weight = problem.target.recall or None
        judge = HeldOut(model, text.rerank, weight=weight, seed=problem.target.seed)
        kinds: Mapping[Stage, Sequence[Kind]] = KINDS
        made: list[tuple[Removal, Repaired]] = []
        with problem.progress("repairing finalists", len(options)) as advance:
            for state, trimmed in zip(ranked, options, strict=True):
                if made and over():
                    break
                repaired = best_repair(model, trimmed, fit, judge, kinds, over=over)
                made.append((state, repaired))
                kinds = repaired.winners
                if state.mode == "projected":
                    kinds = {**kinds, "prefill": _with_kv(kinds["prefill"])}
                advance(1)
        return min(made, key=lambda pair: pair[1].score.loss)


def without_last(best: Removal, goal: Goal) -> Removal | None:
    """A state whose prefill lost its last units in place of those that the state has lost.

    None where prefill's units are not its own to choose, or it has lost none.
    """
    if best.mode != "projected" or not best.prefill:
        return None
    state = replace(best, prefill=frozenset())
    for unit in reversed(range(best.num_units)):
        if goal.met(state):
            break
        state = state.remove("prefill", unit)
    return state


def _measured(objective: Objective, state: Removal) -> bool:
    """Whether a state is measured, or can be: neither budget nor time is over."""
    if state not in objective.memo:
        try:
            objective.measure(state)
        except BudgetSpent:
            return False
    return True


def _with_kv(kinds: Sequence[Kind]) -> tuple[Kind, ...]:
    return tuple(dict.fromkeys((*kinds, "kv", "outputs+kv")))
