"""The loss of a search state on a text, with memo, prefix reuse and a meter in block-tokens.

Every evaluation keeps the streams that enter each layer. A candidate that differs from the state
the search stands on in no layer before i is computed from layer i only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pdtrim.calibration.teacher import Teacher
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.models.model import Model
from pdtrim.plan import Gates
from pdtrim.search.state import Removal
from pdtrim.stage.cost import block_tokens
from pdtrim.stage.forward import Batch, Pair, Trace, streams

ROWS = 8  # sequences run together

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
    return streams(Pair.dense(model), batch, Gates.dense(model.num_layers))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A state's loss, and the streams from which its neighbours start."""

    state: Removal
    loss_n: Tensor  # of each sequence
    traces: list[Trace]

    @property
    def loss(self) -> float:
        """Mean over sequences."""
        return float(self.loss_n.mean())


class BudgetSpent(Exception):
    """The search has used its block-tokens."""


class Objective:
    """Mean loss of a state under prefill/decode inference; lower is better.

    Args:
        policy: KV policy that candidates are measured under; None is full.
        budget: block-tokens it may spend, None for no limit. The dense pass counts.
    """

    def __init__(
        self,
        model: Model,
        batch: Batch,
        *,
        loss: LossMaker = kl_loss,
        policy: HandoverPolicy | None = None,
        budget: int | None = None,
    ) -> None:
        batch = batch.to(model.device)
        self.pair = Pair.dense(model)
        self.policy = policy or HandoverPolicy.full(model.num_layers)
        self.batches = [batch[i : i + ROWS] for i in range(0, len(batch), ROWS)]
        self.losses = [loss(model, part) for part in self.batches]
        self.budget = budget
        self.memo: dict[Removal, float] = {}
        self.spent = self._cost(Gates.dense(model.num_layers), 0)
        self.origin: Measured | None = None

    def stand_on(self, measured: Measured) -> None:
        """Make a measured state the one that candidates are resumed from."""
        self.origin = measured

    @torch.inference_mode()
    def measure(self, state: Removal) -> Measured:
        """Evaluate a state from the first layer in which it differs from where the search stands.

        Raises:
            BudgetSpent: the evaluation would pass the budget.
        """
        gates = state.gates
        start = 0 if self.origin is None else first_difference(self.origin.state.gates, gates)
        cost = self._cost(gates, start)
        if self.budget is not None and self.spent + cost > self.budget:
            raise BudgetSpent
        self.spent += cost
        resumes = [None] * len(self.batches) if self.origin is None else self.origin.traces
        traces = [
            streams(self.pair, batch, gates, self.policy, resume=resume, start=start)
            for batch, resume in zip(self.batches, resumes, strict=True)
        ]
        parts = [loss(trace[-1][1]) for loss, trace in zip(self.losses, traces, strict=True)]
        measured = Measured(state=state, loss_n=torch.cat(parts), traces=traces)
        self.memo[state] = measured.loss
        return measured

    def _cost(self, gates: Gates, start: int) -> int:
        return sum(
            block_tokens(
                gates,
                sequences=len(batch),
                prefill=batch.prompt_BP.shape[1] - 1,
                decode=batch.continuation_BC.shape[1],
                start=start,
            )
            for batch in self.batches
        )


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
