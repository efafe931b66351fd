"""The loss of a search state on a text, with memo, prefix reuse and a meter in block-tokens.

Every evaluation can keep the streams that enter each layer. A candidate that differs from a state
the search stands on in no layer before i is computed from layer i only.

The text is cut into parts, always the same: a state can be measured on the first few of them and
on the rest later, and its losses are the same numbers as if all had been measured at once.

Where recall has a weight, each sequence brings rows of its own text that need their prompt
(``calibration/recall.py``), and its loss is the KL plus the weight times what their answers lost.

Shapes: n sequences of the parts measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pdtrim.calibration.recall import answer_loss, recall_text
from pdtrim.calibration.score import Score
from pdtrim.calibration.teacher import Teacher, head_rows
from pdtrim.finite import finite
from pdtrim.keep.journal import Journal
from pdtrim.models.model import Model
from pdtrim.plan import Gates
from pdtrim.search.state import Removal
from pdtrim.stage.cost import block_tokens
from pdtrim.stage.forward import Batch, Pair, Trace, Trimmed

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


class Traces(NamedTuple):
    """Streams of each part's sequences, and of its rows of recall if there are any."""

    text: list[Trace]
    recall: list[Trace]


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """A state's loss, and the streams from which its neighbours start.

    Attributes:
        parts: how many parts of the text were measured.
        run: makes the streams; called once, when they are first asked for.
    """

    state: Removal
    loss_n: Tensor
    parts: int
    run: Callable[[], Traces]

    @property
    def loss(self) -> float:
        """Mean over sequences."""
        return float(self.loss_n.mean())

    @cached_property
    def streams(self) -> Traces:
        """Streams of all that was measured."""
        return self.run()

    @property
    def traces(self) -> list[Trace]:
        """Streams of each part's sequences."""
        return self.streams.text


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
        recall: weight of recall in the loss; 0 does not measure it.
        seed: of the rows of recall.
        pair_of: the pair that runs under some gates without dead work; None is ``start``'s. What it
            gives a layer may depend on the gates of this layer and those before.

    Attributes:
        memo: loss of every state measured on the whole text.
        late: whether the time for the search is over; asked once a state meets the goal.
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
        recall: float = 0.0,
        seed: int = 0,
        pair_of: Callable[[Gates], Pair] | None = None,
    ) -> None:
        batch = batch.to(model.device)
        self.model = model
        self.start = start or Trimmed.dense(model)
        self.pair_of = pair_of
        rows = min(ROWS, -(-len(batch) // PARTS))
        self.batches = batch.parts(rows)
        self.losses = [loss(model, part) for part in self.batches]
        self.weight = recall
        self.recalls = []
        if recall:
            whole = recall_text(model, batch, seed=seed)
            self.recalls = [whole[i : i + rows] for i in range(0, len(batch), rows)]
        self.budget = budget
        self.journal = journal
        self.memo: dict[Removal, float] = {}
        self.known: dict[Removal, Tensor] = {}
        self.known_recall: dict[Removal, Tensor] = {}
        self.dense_recall = [self._answers(i, self._dense_stream(i)) for i in self._recalled()]
        self.dense_cost = self._cost(Gates.dense(model.num_layers), 0, range(len(self.batches)))
        self.spent = self.dense_cost
        self.origins: tuple[Measured, ...] = ()
        self.late: Callable[[], bool] = lambda: False
        self.held = False

    def hold(self) -> None:
        """From here on an evaluation that begins late ends the search as a spent budget does."""
        self.held = True

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
        if self.held:
            self._be_in_time()
        self.spent += cost
        made: list[Traces] = []

        def forwards() -> list[float]:
            resume = None if origin is None else origin.streams
            made.append(self._run(gates, parts, resume, start))
            text, recall = made[0]
            kl = [self.losses[i](t[-1][1]) for i, t in zip(parts, text, strict=True)]
            gone = [
                self.recalls[i].lost(self._answers(i, t[-1][1]), self.dense_recall[i])
                for i, t in zip(self._recalled(parts), recall, strict=True)
            ]
            return torch.cat([*kl, *gone]).tolist()

        if self.journal is None:
            values = forwards()
        else:
            values = self.journal.once(_key(state, parts, self.spent), forwards)
        measured = finite(torch.tensor(values), "the loss of a removal")
        if self.recalls:
            kl_n, recall_n = measured.view(2, -1)
            loss_n = kl_n + self.weight * recall_n
            _add(self.known_recall, state, parts, recall_n)
        else:
            loss_n = measured
        known_n = _add(self.known, state, parts, loss_n)
        if parts.stop == len(self.batches):
            self.memo[state] = float(known_n.mean())
        return Measured(
            state=state,
            loss_n=loss_n,
            parts=parts.stop,
            run=lambda: made[0] if made else self._run(gates, parts, None, 0),
        )

    def _be_in_time(self) -> None:
        """Raise where it is late; a search that is resumed ends where it did."""
        key: dict[str, object] = {"late": self.spent}
        journal = self.journal
        replaying = journal is not None and journal.replaying
        if not (journal is not None and journal.holds(key) if replaying else self.late()):
            return
        if journal is not None:
            journal.once(key, list)
        raise BudgetSpent

    @torch.inference_mode()
    def _run(self, gates: Gates, parts: range, resume: Traces | None, start: int) -> Traces:
        trimmed = replace(self.start, gates=gates)
        if self.pair_of is not None:
            trimmed = replace(trimmed, pair=self.pair_of(trimmed.gates))

        def streams(batch: Batch, before: list[Trace] | None, part: int) -> Trace:
            return trimmed.streams(
                batch, resume=None if before is None else before[part], start=start
            )

        return Traces(
            text=[streams(self.batches[i], resume and resume.text, i) for i in parts],
            recall=[
                streams(self.recalls[i].batch, resume and resume.recall, i)
                for i in self._recalled(parts)
            ],
        )

    def _recalled(self, parts: range | None = None) -> range:
        """The parts that have rows of recall: all of them, or none."""
        parts = range(len(self.batches)) if parts is None else parts
        return parts if self.recalls else range(0)

    def _answers(self, part: int, y_BCE: Tensor) -> Tensor:
        return answer_loss(self.model, self.recalls[part], y_BCE)

    @torch.inference_mode()
    def _dense_stream(self, part: int) -> Tensor:
        return Trimmed.dense(self.model).last_stream(self.recalls[part].batch)

    def score_of(self, state: Removal) -> Score:
        """KL and recall of a state that was measured on the whole text."""
        recall = float(self.known_recall[state].mean()) if self.recalls else None
        kl = self.memo[state] - self.weight * (recall or 0.0)
        return Score(kl=kl, recall=recall, weight=self.weight)

    def _nearest(self, gates: Gates, parts: int) -> tuple[Measured | None, int]:
        """The origin that shares most layers with the candidate, and how many."""
        found: tuple[Measured | None, int] = (None, 0)
        for origin in self.origins:
            start = first_difference(origin.state.gates, gates) if origin.parts >= parts else 0
            if start > found[1]:
                found = origin, start
        return found

    @torch.inference_mode()
    def timed(self, state: Removal) -> tuple[float, int]:
        """Seconds and block-tokens of a state on the first part; neither counted nor kept."""
        begun, part = time.perf_counter(), range(1)
        text, recall = self._run(state.gates, part, None, 0)
        streams = [trace[-1][1].flatten(0, 1) for trace in text]
        streams += [trace[-1][1][self.recalls[0].answer_BC] for trace in recall]
        for some in torch.cat(streams).split(head_rows(self.model.device)):
            float(F.log_softmax(self.model.head(some), -1, dtype=torch.float32).sum())
        return time.perf_counter() - begun, self._cost(state.gates, 0, part)

    def quote(self, state: Removal) -> int:
        """Block-tokens that measuring a state on the whole text would be charged now."""
        parts = range(len(self.batches))
        return self._cost(state.gates, self._nearest(state.gates, parts.stop)[1], parts)

    def _cost(self, gates: Gates, start: int, parts: range) -> int:
        texts = [self.batches[i] for i in parts]
        texts += [self.recalls[i].batch for i in self._recalled(parts)]
        return sum(
            block_tokens(
                gates,
                sequences=len(batch),
                prefill=batch.prompt_BP.shape[1] - 1,
                decode=batch.continuation_BC.shape[1],
                start=start,
            )
            for batch in texts
        )


def _add(known: dict[Removal, Tensor], state: Removal, parts: range, new_n: Tensor) -> Tensor:
    """Put numbers of some parts behind those of the parts before; returns all of them."""
    if parts.start:
        new_n = torch.cat((known[state], new_n))
    if len(new_n) >= len(known.get(state, ())):
        known[state] = new_n
    return new_n


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
