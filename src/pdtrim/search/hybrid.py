"""Hybrid search: greedy seed, pair table, surrogate proposals that race, then swaps with a tabu.

1. Greedy, whose measurements are kept. Where the budget does not reach the end of a full greedy,
   steps try a shortlist of what looked best before, as long as the budget allows.
2. Pair removals on the first part of the text, up to a share of what greedy leaves.
3. A surrogate of single and pair terms, fitted to everything measured, proposes states that meet
   the goal. They race: measured on growing, fixed, nested parts of the text, each is dropped as
   soon as it is clearly worse than the leader on the same sequences.
4. Swaps from the best state. The surrogate, fitted anew after each measurement, picks among random
   neighbours; units just swapped are taboo for a while; worse states are accepted as in annealing;
   after some steps without a new best the walk goes on from the next best state.

The result is the best state measured on the whole text, so it is never worse there than greedy's.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from pdtrim.plan import Stage
from pdtrim.search.anneal import Annealing, accepts, random_state, swap
from pdtrim.search.goal import SEARCH_ORDER, Goal
from pdtrim.search.greedy import greedy
from pdtrim.search.objective import Measured, Objective
from pdtrim.search.pairs import Surrogate, measure_pairs
from pdtrim.search.state import Removal

StageUnit = tuple[Stage, int]
NOTHING = 1e-6  # nats; a smaller loss is rounding


@dataclass(frozen=True, kw_only=True)
class Hybrid:
    """Settings.

    Attributes:
        pairs, proposals: shares, of the block-tokens that greedy leaves, of these phases; the walk
            has the rest.
        annealing: temperatures of the walk; without a budget, greedy leaves its ``steps`` times
            two thirds of a dense pass, which is what a random swap costs.
        race: proposals that start a race.
        neighbours: random swaps among which the surrogate picks.
        tabu: swaps for which a swapped unit rests.
        patience: measurements without a new best after which the walk starts elsewhere.
        halving: greedy drops its worse candidates on part of the text.
    """

    pairs: float = 0.4
    proposals: float = 0.3
    annealing: Annealing = field(default_factory=Annealing)
    race: int = 12
    neighbours: int = 60
    tabu: int = 3
    patience: int = 8
    halving: bool = False


def hybrid(
    objective: Objective,
    start: Measured,
    goal: Goal,
    config: Hybrid,
    *,
    rng: random.Random,
    shortlist: int | None = None,
    advance: Callable[[float], None] = lambda amount: None,
) -> Measured:
    """The best state met. Ends early, without an error, when the budget is spent.

    Raises:
        BudgetSpent: the budget does not reach the end of a greedy with one candidate a step.
    """
    seed = greedy(
        objective,
        start,
        goal,
        shortlist=shortlist,
        thrifty=True,
        halving=config.halving,
        advance=advance,
    )
    if seed.state == start.state or not goal.met(seed.state):
        return seed
    objective.hold()
    left: float = config.annealing.steps * 2 / 3 * objective.dense_cost
    if objective.budget is not None:
        left = objective.budget - objective.spent
    search = _Search(objective, start, seed, goal, config, rng, advance)
    with objective.allowance(left):
        for stage in SEARCH_ORDER:
            share = goal.least(stage) / sum(goal.least(s) for s in SEARCH_ORDER)
            with objective.allowance(config.pairs * share * left):
                base = start.state if stage == SEARCH_ORDER[0] else _without_prefill(seed, start)
                measure_pairs(objective, base, goal, stage)
        with objective.allowance(config.proposals * left):
            search.propose()
        search.walk()
    return seed if search.best == seed.state else objective.recall(search.best)


def clearly_worse(difference_n: Tensor) -> bool:
    """Whether paired differences to the leader lie two standard errors above 0; needs three."""
    if len(difference_n) < 3:
        return False
    error = float(difference_n.std()) / math.sqrt(len(difference_n))
    return float(difference_n.mean()) - 2 * error > 0


def race(objective: Objective, leader: Removal, candidates: list[Removal]) -> list[Removal]:
    """Candidates that were not clearly worse than the leader on any nested part, best first.

    At each part the best so far go on first, should the budget end.

    Args:
        leader: a state measured on the whole text.

    Raises:
        BudgetSpent: the evaluation would pass the budget.
    """
    for parts in objective.levels:
        kept = []
        for state in candidates:
            loss_n = objective.score(state, parts)
            if not clearly_worse(loss_n - objective.known[leader][: len(loss_n)]):
                kept.append(state)
        candidates = sorted(kept, key=lambda state: float(objective.known[state].mean()))
    return candidates


def _without_prefill(seed: Measured, start: Measured) -> Removal:
    """The state from which greedy began to remove prefill's units."""
    state = seed.state
    for unit in seed.state.prefill - start.state.prefill:
        state = state.restore("prefill", unit)
    return state


@dataclass(frozen=True)
class _Search:
    """What the phases behind greedy share."""

    objective: Objective
    start: Measured
    seed: Measured
    goal: Goal
    config: Hybrid
    rng: random.Random
    advance: Callable[[float], None]

    @property
    def best(self) -> Removal:
        """The best state measured on the whole text."""
        return self._ranked()[0]

    def propose(self) -> None:
        """Race the states that the surrogate likes best."""
        self.objective.stand_on(self.seed, self.start)
        surrogate = self._surrogate()
        pool = self._descend(surrogate, self.seed.state)
        for _ in range(self.config.race):
            state = random_state(self.start.state, self.goal, self.rng)
            if self.goal.met(state):
                pool |= self._descend(surrogate, state)
        unknown = [state for state in pool if state not in self.objective.memo]
        ranked = sorted(unknown, key=lambda state: pool[state])[: self.config.race]
        race(self.objective, self.best, ranked)

    def walk(self) -> None:
        """Swaps until the budget is spent or nothing new is met."""
        current, begun = self.best, {self.best}
        record, since, idle = self.objective.memo[current], 0, 0
        tabu: deque[frozenset[StageUnit]] = deque(maxlen=self.config.tabu)
        end = self.objective.budget
        assert end is not None  # the phase has an allowance
        first = self.objective.spent
        self.objective.stand_on(self.seed, self.start)
        while idle < self.config.patience:
            candidate = self._neighbour(current, tabu, record, swaps=1 + idle // 2)
            if candidate is None:
                idle += 1
                continue
            idle, since = 0, since + 1
            self.advance(1)
            loss = self._measured(candidate)
            done = (self.objective.spent - first) / max(end - first, 1)
            if loss is not None and self._accept(current, loss, done):
                tabu.append(_changed(current, candidate))
                current = candidate
            if loss is not None and loss < record:
                record, since = loss, 0
                self.objective.stand_on(self.objective.measure(candidate), self.start)
            if since > self.config.patience:
                since = 0
                current = next((s for s in self._ranked() if s not in begun), self.best)
                begun.add(current)

    def _measured(self, candidate: Removal) -> float | None:
        """Loss on the whole text; None where the race against the best ends before."""
        kept = race(self.objective, self.best, [candidate])
        return self.objective.memo[candidate] if kept else None

    def _accept(self, current: Removal, loss: float, done: float) -> bool:
        hot, cold = self.config.annealing.hot, self.config.annealing.cold
        temperature = max(hot * (cold / hot) ** done * self.seed.loss, 1e-9)
        return accepts(self.objective.memo[current], loss, temperature, self.rng)

    def _neighbour(
        self, current: Removal, tabu: deque[frozenset[StageUnit]], record: float, *, swaps: int
    ) -> Removal | None:
        """The neighbour, not measured yet, that the surrogate likes best.

        A taboo one is allowed if its prediction beats the record.
        """
        states = self._swapped(current, swaps)
        states = [state for state in states if state not in self.objective.known]
        if not states:
            return None
        resting = frozenset[StageUnit]().union(*tabu)
        ranked = sorted(zip(self._surrogate().predict(states), range(len(states)), strict=True))
        for predicted, index in ranked:
            if predicted < record or not _changed(current, states[index]) & resting:
                return states[index]
        return None

    def _swapped(self, state: Removal, swaps: int) -> list[Removal]:
        found: dict[Removal, None] = {}
        for _ in range(self.config.neighbours):
            other = state
            for _ in range(swaps):
                other = swap(other, self.goal, self.rng) or other
            found[other] = None
        return list(found)

    def _descend(self, surrogate: Surrogate, state: Removal) -> dict[Removal, float]:
        """States met on the way down the surrogate, with their predictions."""
        met: dict[Removal, float] = {}
        here = surrogate.predict([state])[0]
        while True:
            states = self._swapped(state, 1)
            predicted = surrogate.predict(states)
            met |= dict(zip(states, predicted, strict=True))
            if not min(predicted) < here:  # it falls at each step, among finitely many states
                return met
            here = min(predicted)
            state = states[predicted.index(here)]

    def _surrogate(self) -> Surrogate:
        """Fitted to all measured states; a loss on part of the text is scaled to the whole."""
        losses = {
            state: float(loss_n.mean()) * self._scale(len(loss_n))
            for state, loss_n in self.objective.known.items()
            if state != self.start.state
        }
        return Surrogate.fit(losses)

    def _scale(self, rows: int) -> float:
        """The seed's loss on the whole text over its loss on the first sequences."""
        here = float(self.seed.loss_n[:rows].mean())
        return self.seed.loss / here if here > NOTHING else 1.0

    def _ranked(self) -> list[Removal]:
        """States that meet the goal, measured on the whole text, best first."""
        memo = self.objective.memo
        return sorted((s for s in memo if self.goal.met(s)), key=lambda state: memo[state])


def _changed(a: Removal, b: Removal) -> frozenset[StageUnit]:
    return frozenset((stage, unit) for stage in SEARCH_ORDER for unit in a.of(stage) ^ b.of(stage))
