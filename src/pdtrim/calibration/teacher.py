"""What the dense model says of each continuation token: its top K log-probabilities and the rest.

``KL(p || q)`` over K + 1 outcomes, the K likeliest tokens of the dense model p and one bucket for
all others. By the data-processing inequality this never exceeds the exact KL; with K = 512 it falls
short of it by little, and a candidate costs no dense forward. Reports use the exact KL instead.

Shapes: B batch, C continuation tokens, V vocabulary, K kept tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pdtrim.finite import finite
from pdtrim.models.model import Model
from pdtrim.stage.forward import Batch, Trace, Trimmed

TOP = 512
ROWS = 8  # sequences run together


def head_rows(device: torch.device) -> int:
    """Positions whose logits are held at once.

    V x 64 floats stay in a CPU's last-level cache; a GPU would read the head's weights for each 64
    and wait for Python in between.
    """
    return 64 if device.type == "cpu" else 512


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Cached dense log-probabilities of one batch."""

    ids_BCK: Tensor
    logp_BCK: Tensor
    rest_BC: Tensor  # log of the mass outside the top K

    @classmethod
    @torch.inference_mode()
    def of(cls, model: Model, batch: Batch, *, top: int = TOP) -> Teacher:
        """Run the dense model over the batch, a few sequences at a time."""
        dense = Trimmed.dense(model)
        return cls.heard(model, map(dense.streams, batch.parts(ROWS)), top=top)

    @classmethod
    @torch.inference_mode()
    def heard(cls, model: Model, traces: Iterable[Trace], *, top: int = TOP) -> Teacher:
        """The teacher of a batch whose parts the dense model has run."""
        top = min(top, model.config.vocab_size - 1)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        C = 0
        for trace in traces:
            check_streams(model, trace)
            C = trace[-1][1].shape[1]
            for y_RE in trace[-1][1].flatten(0, 1).split(head_rows(model.device)):
                logp_RV = F.log_softmax(model.head(y_RE), -1, dtype=torch.float32)
                logp_RK, ids_RK = logp_RV.topk(top, dim=-1)
                rest_R = log_rest(logp_RK)
                parts.append((ids_RK, logp_RK, rest_R))
        ids, logp, rest = (torch.cat(column) for column in zip(*parts, strict=True))
        return cls(
            ids_BCK=ids.view(-1, C, top), logp_BCK=logp.view(-1, C, top), rest_BC=rest.view(-1, C)
        )

    @torch.inference_mode()
    def kl(self, model: Model, y_BCE: Tensor) -> Tensor:
        """KL of each sequence ``[B]``, nats a token, of the head's word on a last stream."""
        B, C = self.rest_BC.shape
        rows = head_rows(y_BCE.device)
        columns = (
            y_BCE.flatten(0, 1),
            self.ids_BCK.flatten(0, 1),
            self.logp_BCK.flatten(0, 1),
            self.rest_BC.flatten(),
        )
        parts = []
        for y, ids, logp, rest in zip(*(c.split(rows) for c in columns), strict=True):
            logq = F.log_softmax(model.head(y), -1, dtype=torch.float32).gather(-1, ids)
            parts.append(bucketed_kl(logp, rest, logq))
        return torch.cat(parts).view(B, C).mean(1)


def check_streams(model: Model, trace: Trace) -> None:
    """Refuse a text on which the dense model makes NaN or infinity.

    Raises:
        PdtrimError: it does; the message names the first layer that writes some.
    """
    if bool(torch.isfinite(trace[-1][1]).all()):
        return
    for layer, written in enumerate(trace[1:]):
        for stream in written:
            finite(stream, f"what layer {layer} of '{model.name}' writes on the calibration text")


def log_rest(logp_RK: Tensor) -> Tensor:
    """Log of the probability that the K tokens leave over."""
    return (1 - logp_RK.double().exp().sum(-1)).clamp_min(1e-9).log().float()


def bucketed_kl(logp_RK: Tensor, rest_R: Tensor, logq_RK: Tensor) -> Tensor:
    """KL over the K tokens and the bucket of all others, ``[R]``."""
    inside = (logp_RK.exp() * (logp_RK - logq_RK)).sum(-1)
    return inside + rest_R.exp() * (rest_R - log_rest(logq_RK))
