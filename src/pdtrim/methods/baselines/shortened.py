"""``shortened-ppl`` and ``shortened-taylor``: one-shot removal (Shortened LLaMA, 2402.02834).

Perplexity: the text's perplexity without each block alone::

    PPL_i = exp(mean NLL a token of the model without block i)

Taylor: with L the mean NLL a token of the dense model over the whole text, and w the weights of
block i, all of its parameters::

    T_i = sum_{w in block i} | w * dL/dw |

Blocks of the lowest score go, all at once. ``+`` in the paper means that the first 4 and the last 2
blocks are never removed; that is the default for Taylor, and ``protect_first`` and ``protect_last``
bring it to perplexity, whose published results are without.

Both scores are taken on 10 sequences of 128 tokens of BookCorpus, and LoRA or further training
follows. Different here: the text is the user's; perplexity is that of continuation tokens
(``nll.py``), while Taylor's gradients are of every token, from an ordinary forward; nothing is
trained. Taylor pays three passes: the backward one counts as two.

In mode ``subset`` prefill loses the lowest-scored of decode's. In mode ``projected`` perplexity is
measured without the block in one stage; Taylor refuses, as a gradient belongs to both stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pdtrim.finite import finite
from pdtrim.methods.baselines.base import Baseline, Chosen, PaperCalibration
from pdtrim.methods.baselines.gradients import (
    GRADIENT_ROWS,
    PASSES,
    add_gradients,
    wanting_gradients,
)
from pdtrim.methods.baselines.nll import nll_objective
from pdtrim.methods.baselines.orders import apply_orders, open_blocks, ranking_mode
from pdtrim.methods.baselines.residuals import dense_cost
from pdtrim.methods.problem import Problem
from pdtrim.models.model import Model
from pdtrim.plan import Stage
from pdtrim.search.goal import SEARCH_ORDER
from pdtrim.stage.forward import Batch

TEXT = PaperCalibration(source="BookCorpus", sequences=10, tokens=128)


def taylor_salience(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> float:
    """Sum of |w * g| over all elements of a block's weights."""
    pairs = zip(weights, gradients, strict=True)
    return sum(float((w.float() * g.float()).abs().sum(dtype=torch.float64)) for w, g in pairs)


def taylor_scores(model: Model, batch: Batch, *, rows: int = GRADIENT_ROWS) -> list[float]:
    """Salience of each block for the mean NLL of all tokens; the model is left as it was.

    Args:
        rows: sequences run together; signed gradients add up over all of them.
    """
    weights = [list(model.block(layer).module.parameters()) for layer in range(model.num_layers)]
    flat = [w for block in weights for w in block]
    with wanting_gradients(flat):
        add_gradients(model, batch, flat, rows=rows)
        with torch.no_grad():
            return [taylor_salience(ws, [w.grad for w in ws]) for ws in weights]


@dataclass(frozen=True, kw_only=True)
class ShortenedPPL(Baseline):
    """Settings: how many blocks at each end stay."""

    name = "shortened-ppl"
    paper_calibration = TEXT
    protect_first: int = 0
    protect_last: int = 0

    def choose(self, problem: Problem) -> Chosen:
        """See the module's docstring."""
        left = open_blocks(self.name, problem, self.protect_first, self.protect_last)
        objective, mode = nll_objective(problem), ranking_mode(problem.target)
        whole = objective.measure(problem.dense(mode))
        objective.stand_on(whole)
        stages = [stage for stage in SEARCH_ORDER if problem.goal.missing(whole.state, stage)]
        if mode == "unified":
            stages = ["decode"]
        orders: dict[Stage, list[int]] = {"decode": []}
        with problem.progress("perplexity without a block", len(stages) * len(left)) as advance:
            for stage in stages:
                loss = {}
                for layer in left:
                    loss[layer] = objective.measure(whole.state.remove(stage, layer)).loss
                    advance(1)
                orders[stage] = sorted(loss, key=lambda layer: loss[layer])
        return Chosen(state=apply_orders(problem, orders), block_tokens=objective.spent)


@dataclass(frozen=True, kw_only=True)
class ShortenedTaylor(Baseline):
    """Settings: how many blocks at each end stay."""

    name = "shortened-taylor"
    modes = ("unified", "subset")
    paper_calibration = TEXT
    protect_first: int = 4
    protect_last: int = 2

    def choose(self, problem: Problem) -> Chosen:
        """See the module's docstring."""
        left = open_blocks(self.name, problem, self.protect_first, self.protect_last)
        cost = dense_cost(problem, passes=PASSES)
        with problem.progress("Taylor scores", 1):
            scores = taylor_scores(problem.model, problem.batch)
        finite(torch.tensor([float(scores[layer]) for layer in left]), "a block's Taylor score")
        orders: dict[Stage, list[int]] = {"decode": sorted(left, key=lambda i: scores[i])}
        return Chosen(state=apply_orders(problem, orders), block_tokens=cost)
