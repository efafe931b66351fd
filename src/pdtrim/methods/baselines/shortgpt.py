"""``shortgpt``: Block Influence (ShortGPT, arXiv 2403.03853).

With x_i the stream that enters block i, x_L the last block's output *before* the final norm, and t
a token of text X::

    BI_i = 1 - E_{X, t}[ <x_i, x_{i+1}> / (|x_i| |x_{i+1}|) ]

The blocks of least influence go, all at once and wherever they stand. No gradients, no training.

The paper's calibration is PG19, validation split, in chunks of 256 tokens, every token. Different
here: the text is the user's, and x_L is taken without the norm (``hidden_states[-1]`` of
transformers has it, which gives the last block a foreign influence). In mode ``projected``, prefill
is ranked on prompt tokens and decode on the others.

Shapes: B sequences, T tokens, E hidden width, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from pdtrim.finite import finite
from pdtrim.methods.baselines.base import Baseline, Chosen, PaperCalibration
from pdtrim.methods.baselines.orders import apply_orders
from pdtrim.methods.baselines.residuals import dense_cost, read_residuals
from pdtrim.methods.problem import Problem


def block_influence(flows: Sequence[Tensor]) -> Tensor:
    """BI of each sequence, ``[B, L]``, from 0 (the direction stays) to 2.

    Args:
        flows: L + 1 streams ``[B, T, E]``, the last one before the final norm.
    """
    columns = [
        1 - F.cosine_similarity(before.float(), after.float(), dim=-1).mean(1)
        for before, after in pairwise(flows)
    ]
    return torch.stack(columns, dim=1)


@dataclass(frozen=True, kw_only=True)
class ShortGPT(Baseline):
    """The method has no settings."""

    name = "shortgpt"
    paper_calibration = PaperCalibration(source="PG19 validation", tokens=256)

    def choose(self, problem: Problem) -> Chosen:
        """See the module's docstring."""
        cost = dense_cost(problem)
        parts = read_residuals(problem, "block influence", block_influence)
        influence = {
            stage: finite(torch.cat(part), "a block's influence").mean(0)
            for stage, part in parts.items()
        }
        orders = {stage: bi_L.argsort(stable=True).tolist() for stage, bi_L in influence.items()}
        return Chosen(state=apply_orders(problem, orders), block_tokens=cost)
