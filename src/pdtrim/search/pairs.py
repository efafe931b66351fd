"""Which removals make one another worse: a table of pairs, and a surrogate loss fitted to it.

A pair {i, j} is measured from the state with i alone removed, from j's layer on. Losses of larger
removals are predicted as a sum of single terms and pair terms. In the 12-block toys of the tests a
surrogate fitted to all pairs ranks removals of four blocks with a correlation of 0.9 to 0.96, one
fitted to single removals with 0.5 to 0.75, when both are measured on the whole text.

Shapes: n states, M = 2U units of both stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pdtrim.plan import Stage
from pdtrim.search.goal import Goal
from pdtrim.search.objective import Objective
from pdtrim.search.state import Removal

PAIR = 0.3
"""Weight of a pair term against a single term before anything is measured."""
RIDGE = 0.01
FAMILY = 3  # pairs are measured among this many times as many units as are to be removed


@dataclass(frozen=True, kw_only=True)
class Surrogate:
    """The additive and pairwise loss of least norm through measured states, ridge-smoothed.

    Two states are as alike as they share removed units and pairs of these: with n shared units the
    kernel is ``n + PAIR * n * (n - 1) / 2``. That is ridge regression on all single and pair terms
    without writing them out.
    """

    states_nM: Tensor
    weights_n: Tensor

    @classmethod
    def fit(cls, losses: dict[Removal, float], *, ridge: float = RIDGE) -> Surrogate:
        """Fit losses above the dense model's."""
        states_nM = indicators(list(losses))
        loss_n = torch.tensor(list(losses.values()), dtype=torch.float64)
        kernel_nn = _kernel(states_nM, states_nM)
        kernel_nn += ridge * torch.eye(len(loss_n), dtype=torch.float64)
        return cls(states_nM=states_nM, weights_n=torch.linalg.solve(kernel_nn, loss_n))

    def predict(self, states: Sequence[Removal]) -> list[float]:
        """Losses of other states of the same model."""
        return (_kernel(indicators(states), self.states_nM) @ self.weights_n).tolist()


def indicators(states: Sequence[Removal]) -> Tensor:
    """1 for each removed unit, decode's before prefill's, ``[n, M]``."""
    units = states[0].num_units
    out_nM = torch.zeros(len(states), 2 * units, dtype=torch.float64)
    for row, state in enumerate(states):
        out_nM[row, [*state.decode, *(units + unit for unit in state.prefill)]] = 1
    return out_nM


def _kernel(a_nM: Tensor, b_mM: Tensor) -> Tensor:
    shared_nm = a_nM @ b_mM.T
    return shared_nm + PAIR * shared_nm * (shared_nm - 1) / 2


def measure_singles(objective: Objective, base: Removal, goal: Goal, stage: Stage) -> list[int]:
    """Units of a stage by their loss alone, cheapest first.

    What a greedy search measured in its first step is taken from the objective's memo.

    Raises:
        BudgetSpent: the evaluation would pass the budget.
    """
    loss = {
        unit: float(objective.score(base.remove(stage, unit), 1).mean())
        for unit in goal.useful(base, stage)
    }
    return sorted(loss, key=lambda unit: loss[unit])


def measure_pairs(objective: Objective, base: Removal, goal: Goal, stage: Stage) -> None:
    """Measure pair removals on the first part of the text; they stay in the objective's memo.

    Only among the cheapest units alone, and the pairs of the cheapest first, so that a budget that
    ends early leaves those that matter.

    Raises:
        BudgetSpent: the budget of this phase is used.
    """
    if goal.least(stage) < 2:
        return  # no state holds a pair
    cheap = measure_singles(objective, base, goal, stage)[: FAMILY * goal.least(stage)]
    for first in cheap:
        single = base.remove(stage, first)
        partners = [unit for unit in cheap if unit > first]
        if partners:
            objective.stand_on(objective.measure(single, 1))
        for unit in partners:
            objective.score(single.remove(stage, unit), 1)
