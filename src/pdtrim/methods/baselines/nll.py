"""Negative log-likelihood of a pruned model: what three of the papers rank by.

A unit's score is the NLL of the text without it, or perplexity, which is exp(NLL) and ranks alike
where all sequences are of one length. The papers take every token of ordinary text. Here only the
continuation's tokens count, each seeing its whole prompt: under prefill/decode inference prefill
has no logits, and its stream stops behind the last keys and values that decode reads. In modes
``unified`` and ``subset`` a unit goes from prompt and continuation alike, as in one pruned model;
in mode ``projected`` from one stage, whose score is the harm to the same continuation.

Shapes: B sequences, C continuation tokens, R = B x C of them, E hidden width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pdtrim.calibration.teacher import head_rows
from pdtrim.methods.problem import Problem
from pdtrim.models.model import Model
from pdtrim.search.objective import Loss, Objective
from pdtrim.stage.forward import Batch


def token_nll(logits_RV: Tensor, ids_R: Tensor) -> Tensor:
    """Nats of each token, ``[R]``."""
    return F.cross_entropy(logits_RV.float(), ids_R, reduction="none")


def nll_loss(model: Model, batch: Batch) -> Loss:
    """Mean NLL of each sequence's continuation, nats a token."""
    ids_BC = batch.continuation_BC

    def loss(y_BCE: Tensor) -> Tensor:
        together = head_rows(model.device)
        rows = zip(
            torch.split(y_BCE.flatten(0, 1), together),
            torch.split(ids_BC.flatten(), together),
            strict=True,
        )
        nll_R = torch.cat([token_nll(model.head(y), ids) for y, ids in rows])
        return nll_R.view_as(ids_BC).mean(1)

    return loss


def nll_objective(problem: Problem) -> Objective:
    """The objective under the target's budget, with the KV cache whole."""
    objective = problem.objective(loss=nll_loss)
    objective.spent = 0  # it charges for the dense model's word, which an NLL does not need
    return objective
