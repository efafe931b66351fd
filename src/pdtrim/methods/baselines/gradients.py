"""Gradients of the language-model loss: what the methods of first order rank by.

With L the mean NLL a token of the dense model over the whole text, every token of it but the first
being predicted by an ordinary causal forward::

    g = dL/dw

Two of the papers score with it, the blocks of ``shortened.py`` and the heads and neurons of
``llm_pruner.py``. A pass here is a forward and a backward one; the methods pay three for it, as the
backward one counts as two.

Shapes: B sequences, T tokens, V vocabulary, R rows of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pdtrim.methods.baselines.nll import token_nll
from pdtrim.methods.baselines.residuals import dense_residuals
from pdtrim.models.model import Model
from pdtrim.stage.forward import Batch

GRADIENT_ROWS = 2  # sequences run together: a backward pass holds what every block made of them
PASSES = 3  # a forward one, and a backward one of twice its work


@contextmanager
def wanting_gradients(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, the weights want gradients and have none yet; behind it all is as it was before."""
    before = [(w.requires_grad, w.grad) for w in weights]
    try:
        for w in weights:
            w.requires_grad_(True)
            w.grad = None
        yield
    finally:
        for w, (wanted, gradient) in zip(weights, before, strict=True):
            w.grad = gradient
            w.requires_grad_(wanted)


def add_gradients(
    model: Model, batch: Batch, weights: Sequence[nn.Parameter], *, rows: int = GRADIENT_ROWS
) -> None:
    """Add to the ``grad`` of weights that want one that of the mean NLL of all tokens.

    Args:
        rows: sequences run together; signed gradients add up over all of them.
    """
    with torch.enable_grad():
        for part in batch.parts(rows):
            logits_BTV = model.head(dense_residuals(model, part)[-1])
            nll_R = token_nll(logits_BTV.flatten(0, 1), part.ids_BT[:, 1:].flatten())
            loss = nll_R.mean() * (len(part) / len(batch))
            loss.backward(inputs=list(weights))


def gradients_and_squares(
    model: Model, batch: Batch, weights: Sequence[nn.Parameter]
) -> dict[nn.Parameter, Tensor]:
    """Leave the mean gradient with each weight; returns the mean square of one sequence's."""
    means = [torch.zeros_like(w) for w in weights]
    squares = [torch.zeros_like(w) for w in weights]
    for row in range(len(batch)):
        for w in weights:
            w.grad = None
        add_gradients(model, batch[row : row + 1], weights)
        for w, mean, square in zip(weights, means, squares, strict=True):
            assert w.grad is not None
            mean += w.grad / len(batch)
            square += w.grad.square() / len(batch)
    for w, mean in zip(weights, means, strict=True):
        w.grad = mean
    return dict(zip(weights, squares, strict=True))
