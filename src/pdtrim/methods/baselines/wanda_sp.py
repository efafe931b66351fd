"""``wanda-sp``: weights times their inputs, for units (Wanda-SP, in FLAP, arXiv 2312.11983).

With W the weights of an output projection (o or down), X_j its input channel j as a vector over all
tokens, and i an output of E::

    M_j = 1/E sum_i |W_ij| |X_j|_2

An MLP neuron scores its own channel of down, a KV group the sum over its query heads' channels of
o. Units of the lowest score go at one ratio in every block, in order of the blocks: what a
narrower block makes is what the next one is scored on. The scores are Wanda's (2306.11695), which
removes single weights; the authors of FLAP made them a baseline for whole units. Nothing makes up
for what is cut.

That paper calibrates on 128 sequences of 128 tokens of C4. Different here: the text is the user's,
units of attention are whole KV groups, and the ratio of groups is rounded and neurons make up for
it (``uniform.py``). It pays two passes, of the block as it is and of the narrower one. In mode
``subset`` the later blocks are scored behind decode's narrower ones.

Shapes: B sequences, T tokens, E hidden width, F input channels of a projection, G KV groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pdtrim.methods.baselines.base import PaperCalibration
from pdtrim.methods.baselines.moments import Moments, watched
from pdtrim.methods.baselines.residuals import whole_blocks
from pdtrim.methods.baselines.uniform import each_uniform, without_first
from pdtrim.methods.baselines.width import (
    Costs,
    Narrowed,
    Units,
    UnitScores,
    WidthMethod,
    group_sums,
    width_without,
)
from pdtrim.methods.problem import Problem
from pdtrim.models.block import OUTPUTS, Block
from pdtrim.models.narrow import narrow_blocks
from pdtrim.search.objective import ROWS


def channel_scores(weight_EF: Tensor, norm_F: Tensor) -> Tensor:
    """Mean over the outputs of |W| times the length of the input channel, ``[F]``."""
    return weight_EF.abs().mean(0) * norm_F


@dataclass(frozen=True, kw_only=True)
class WandaSP(WidthMethod):
    """The method has no settings."""

    name = "wanda-sp"
    passes = 2
    paper_calibration = PaperCalibration(source="C4", sequences=128, tokens=128)

    @torch.no_grad()
    def choose(self, problem: Problem, costs: Costs) -> Narrowed:
        """See the module's docstring."""
        model, progress = problem.model, problem.progress
        layers = range(model.num_layers)
        counts = each_uniform(self.name, model, costs, layers)
        ids_BT = problem.batch.ids_BT[:, :-1]
        flows = [model.embed(ids) for ids in ids_BT.split(ROWS)]
        run = whole_blocks(model, ids_BT.shape[1])
        orders: dict[int, Units] = {}
        with progress("weights times inputs", len(layers)) as advance:
            for layer in layers:
                block = model.block(layer)
                with watched(block) as moments:
                    for x_BTE in flows:
                        run(block, x_BTE)
                order = orders[layer] = _scores(block, model.num_kv_heads, *moments).order()
                width = width_without(model, order.first(*counts["decode"][layer]))
                narrow = narrow_blocks(model, {layer: width} if width else {}).block(layer)
                flows = [run(narrow, x_BTE) for x_BTE in flows]
                advance(1)
        return without_first(orders, counts)


def _scores(block: Block, num_groups: int, attention: Moments, mlp: Moments) -> UnitScores:
    o, down = (block.matrix(made).weight.double() for made in OUTPUTS)
    return UnitScores(
        groups_G=group_sums(channel_scores(o, attention.norm_F), num_groups),
        neurons_F=channel_scores(down, mlp.norm_F),
    )
