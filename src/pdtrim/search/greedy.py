"""Greedy removal: take out the block whose loss hurts least, again and again.

SLEB (2402.09025) with two differences: the measure is KL on continuation tokens under
prefill/decode inference instead of NLL, and no block is protected. With a ``shortlist`` only the
candidates that looked best at their last evaluation are measured again (lazy greedy): a block that
was costly with few others gone is seldom cheap with more.
"""

from __future__ import annotations

from collections.abc import Callable

from pdtrim.plan import Stage
from pdtrim.search.objective import Measured, Objective
from pdtrim.search.state import Removal


def greedy(
    objective: Objective,
    start: Measured,
    stage: Stage,
    count: int,
    *,
    shortlist: int | None = None,
    advance: Callable[[float], None] = lambda amount: None,
) -> Measured:
    """Remove ``count`` more blocks from one stage; stops early only when none is removable.

    Raises:
        BudgetSpent: the objective's budget ran out.
    """
    current = start
    harm: dict[int, float] = {}  # loss added by a block when it was last tried
    for step in range(count):
        objective.stand_on(current)
        candidates = current.state.removable(stage)
        if step and shortlist is not None:
            candidates = sorted(candidates, key=lambda i: harm[i])[:shortlist]
        best: Measured | None = None
        for layer in candidates:
            tried = objective.measure(current.state.remove(stage, layer))
            harm[layer] = tried.loss - current.loss
            if best is None or tried.loss < best.loss:
                best = tried
            advance(1)
        if best is None:
            break
        current = best
    return current


def greedy_evaluations(state: Removal, count: int, shortlist: int | None) -> int:
    """How many evaluations :func:`greedy` makes at most, for progress bars."""
    first = state.num_layers
    return sum(
        min(first - i, shortlist if i and shortlist is not None else first) for i in range(count)
    )
