"""The loss of a search state on a text, with memo, prefix reuse and a meter in block-tokens.

Every evaluation can keep the streams that enter each layer. A candidate that differs from a state
the search stands on in no layer before i is computed from layer i only.

The text is cut into parts, always the same: a state can be measured on the first few of them and
on the rest later, and its losses are the same numbers as if all had been measured at once.

Shapes: n sequences of the parts measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from pdtrim.calibration.teacher import Teacher
from pdtrim.finite import finite
from pdtrim.keep.journal import Journal
from pdtrim.models.model import Model
from pdtrim.plan import Gates
from pdtrim.search.state import Removal
from pdtrim.stage.cost import block_tokens
from pdtrim.stage.forward import Batch, Trace, Trimmed

ROWS = 8  # sequences run together, at most
PARTS = 4  # of the text, at least, where it has as many sequences

Loss = Callable[[Tensor], Tensor]
"""Last stream of decode ``[B, C, E]`` to a loss a sequence ``[B]``; made for one batch."""

LossMaker = Callable[[Model, Batch], Loss]


def kl_loss(model: Model, batch: Batch) -> Loss:
    """KL(dense || pruned), nats a continuation token, over the dense model's top tokens."""
    teacher = Teacher.of(model, batch)
    return lambda y_BCE: teacher.kl(model, y_BCE)


def cosine_loss(model: Model, batch: Batch) -> Loss:
    """1 - cosine between the dense and the pruned last stream, mean over continuation tokens."""
    dense_BCE = dense_trace(model, batch)[-1][1].float()
    return lambda y_BCE: 1 - F.cosine_similarity(dense_BCE, y_BCE.float(), dim=-1).mean(1)


@torch.inference_mode()
def dense_trace(model: Model, batch: Batch) -> Trace:
    """Streams of the dense model."""
    return Trimmed.dense(model).streams(batch)


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """A state's loss, and the streams from which its neighbours start.

    Attributes:
        parts: how many parts of the text were measured.
        run: makes the streams, one trace a part; called once, when they are first asked for.
    """

    state: Removal
    loss_n: Tensor
    parts: int
    run: Callable[[], list[Trace]]

    @property
    def loss(self) -> float:
        """Mean over sequences."""
        return float(self.loss_n.mean())

    @cached_property
    def traces(self) -> list[Trace]:
        """Streams of each part."""
        return self.run()


class BudgetSpent(Exception):
    """The search has used its block-tokens."""


class Objective:
    """Mean loss of a state under prefill/decode inference; lower is better.

    Args:
        model: the dense model, which the loss compares with.
        start: what candidates are cut out of, with the KV policy that they are measured under; None
            is the dense model with all of its KV.
        budget: block-tokens it may spend, None for no limit. The dense pass counts.
        journal: where evaluations are written, and from which an earlier run's are taken. Those
            cost no forward, but the meter counts them, so that a resumed search ends like an
            uninterrupted one; streams that it still needs of them are made again uncounted.

    Attributes:
        memo: loss of every state measured on the whole text.
        known: losses ``[n]`` of every state on the first parts of the text.
    """

    def __init__(
        self,
        model: Model,
        batch: Batch,
        *,
        loss: LossMaker = kl_loss,
        start: Trimmed | None = None,
        budget: int | None = None,
        journal: Journal | None = None,
    ) -> None:
        batch = batch.to(model.device)
        self.model = model
        self.start = start or Trimmed.dense(model)
        rows = min(ROWS, -(-len(batch) // PARTS))
        self.batches = [batch[i : i + rows] for i in range(0, len(batch), rows)]
        self.losses = [loss(model, part) for part in self.batches]
        self.budget = budget
        self.journal = journal
        self.memo: dict[Removal, float] = {}
        self.known: dict[Removal, Tensor] = {}
        self.dense_cost = self._cost(Gates.dense(model.num_layers), 0, range(len(self.batches)))
        self.spent = self.dense_cost
        self.origins: tuple[Measured, ...] = ()

    @property
    def levels(self) -> list[int]:
        """Growing numbers of parts, each the double of the one before, up to the whole text."""
        levels, parts = [], 1
        while parts < len(self.batches):
            levels.append(parts)
            parts *= 2
        return [*levels, len(self.batches)]

    def stand_on(self, *measured: Measured) -> None:
        """Make measured states those that candidates are resumed from, each from the nearest."""
        self.origins = measured

    @contextmanager
    def allowance(self, block_tokens: float) -> Iterator[None]:
        """Spend at most so much more; an evaluation that would pass it ends the ``with`` block."""
        outer, inner = self.budget, self.spent + max(int(block_tokens), 0)
        self.budget = inner if outer is None else min(outer, inner)
        try:
            yield
        except BudgetSpent:
            pass
        finally:
            self.budget = outer

    def measure(self, state: Removal, parts: int | None = None) -> Measured:
        """Evaluate a state, with its streams, from the first layer where it differs from an origin.

        Args:
            parts: how many of the first parts of the text; None for all.

        Raises:
            BudgetSpent: the evaluation would pass the budget.
            PdtrimError: the loss is NaN or infinite.
        """
        return self._evaluate(state, range(parts or len(self.batches)))

    def score(self, state: Removal, parts: int | None = None) -> Tensor:
        """Losses ``[n]`` on the first parts; only those not known yet are computed and charged.

        Raises:
            BudgetSpent: the evaluation would pass the budget.
        """
        parts = parts or len(self.batches)
        count = self._rows(parts)
        known = self.known.get(state, torch.empty(0))
        begin = next(i for i in range(len(self.batches) + 1) if self._rows(i) == len(known))
        if begin < parts:
            self._evaluate(state, range(begin, parts))
        return self.known[state][:count]

    def recall(self, state: Removal) -> Measured:
        """A state that was measured on the whole text; streams, if asked for, are made anew."""
        parts = range(len(self.batches))
        return Measured(
            state=state,
            loss_n=self.known[state],
            parts=len(parts),
            run=lambda: self._run(state.gates, parts, None, 0),
        )

    def _rows(self, parts: int) -> int:
        return sum(len(batch) for batch in self.batches[:parts])

    @torch.inference_mode()
    def _evaluate(self, state: Removal, parts: range) -> Measured:
        gates = state.gates
        origin, start = self._nearest(gates, parts.stop)
        cost = self._cost(gates, start, parts)
        if self.budget is not None and self.spent + cost > self.budget:
            raise BudgetSpent
        self.spent += cost
        made: list[list[Trace]] = []

        def forwards() -> list[float]:
            resume = None if origin is None else origin.traces
            made.append(self._run(gates, parts, resume, start))
            columns = zip(parts, made[0], strict=True)
            return torch.cat([self.losses[i](trace[-1][1]) for i, trace in columns]).tolist()

        if self.journal is None:
            values = forwards()
        else:
            values = self.journal.once(_key(state, parts, self.spent), forwards)
        loss_n = finite(torch.tensor(values), "the loss of a removal")
        self._remember(state, parts, loss_n)
        return Measured(
            state=state,
            loss_n=loss_n,
            parts=parts.stop,
            run=lambda: made[0] if made else self._run(gates, parts, None, 0),
        )

    @torch.inference_mode()
    def _run(
        self, gates: Gates, parts: range, resume: list[Trace] | None, start: int
    ) -> list[Trace]:
        trimmed = replace(self.start, gates=gates)
        return [
            trimmed.streams(
                self.batches[i], resume=None if resume is None else resume[i], start=start
            )
            for i in parts
        ]

    def _remember(self, state: Removal, parts: range, loss_n: Tensor) -> None:
        if parts.start:
            loss_n = torch.cat((self.known[state], loss_n))
        if len(loss_n) >= len(self.known.get(state, ())):
            self.known[state] = loss_n
        if parts.stop == len(self.batches):
            self.memo[state] = float(loss_n.mean())

    def _nearest(self, gates: Gates, parts: int) -> tuple[Measured | None, int]:
        """The origin that shares most layers with the candidate, and how many."""
        found: tuple[Measured | None, int] = (None, 0)
        for origin in self.origins:
            start = first_difference(origin.state.gates, gates) if origin.parts >= parts else 0
            if start > found[1]:
                found = origin, start
        return found

    def quote(self, state: Removal) -> int:
        """Block-tokens that measuring a state on the whole text would be charged now."""
        parts = range(len(self.batches))
        return self._cost(state.gates, self._nearest(state.gates, parts.stop)[1], parts)

    def _cost(self, gates: Gates, start: int, parts: range) -> int:
        return sum(
            block_tokens(
                gates,
                sequences=len(self.batches[i]),
                prefill=self.batches[i].prompt_BP.shape[1] - 1,
                decode=self.batches[i].continuation_BC.shape[1],
                start=start,
            )
            for i in parts
        )


def _key(state: Removal, parts: range, spent: int) -> dict[str, object]:
    """What a journal's line says beside the losses."""
    return {
        "mode": state.mode,
        "grain": state.grain,
        "prefill": sorted(state.prefill),
        "decode": sorted(state.decode),
        "parts": [parts.start, parts.stop],
        "spent": spent,
    }


def first_difference(a: Gates, b: Gates) -> int:
    """The first layer in which two states run something different; the layer count if none."""
    a, b = a.without_dead_work(), b.without_dead_work()
    rows_a, rows_b = (
        zip(g.prefill_attention, g.prefill_mlp, g.decode_attention, g.decode_mlp, strict=True)
        for g in (a, b)
    )
    for layer, (row_a, row_b) in enumerate(zip(rows_a, rows_b, strict=True)):
        if row_a != row_b:
            return layer
    return a.num_layers
