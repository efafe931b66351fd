"""``flap``: channels that fluctuate little go, their mean stays as a bias (FLAP, arXiv 2312.11983).

With W the weights of an output projection (o or down) and x_j its input channel j over all tokens
of the text::

    M_j = Var(x_j) |W_:j|^2_2             (the paper's WIFV)
    Z_j = (M_j - mean(M)) / std(M)        over the channels of one projection of one block

For o, M is squared first, as in the authors' code. An MLP neuron scores Z of its channel of down, a
KV group the mean Z of its query heads' channels of o. All units of all blocks are ranked together,
so each block and each part finds a width of its own (the paper's AL-AM), and the lowest go until
the share of the parameters is reached, each unit counting for what it holds. What the cut channels
made on average stays as a bias::

    b = sum_{j cut} W_:j mean(x_j)

Inputs are the dense model's in every block. The paper calibrates on 1024 sequences of 128 tokens of
WikiText2. Different here: the text is the user's, units of attention are whole KV groups, and one
group and one neuron of each block stay. Where the last unit is a group, worth more than what was
missing, the neurons of the highest score come back, so the share is met to within one neuron; the
biases are counted.

Shapes: E hidden width, F input channels of a projection, G KV groups, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from pdtrim.methods.baselines.base import PaperCalibration
from pdtrim.methods.baselines.moments import Moments, watched
from pdtrim.methods.baselines.one_ranking import each_ranked
from pdtrim.methods.baselines.residuals import each_residuals
from pdtrim.methods.baselines.width import (
    Costs,
    Narrowed,
    Units,
    UnitScores,
    WidthMethod,
    group_sums,
)
from pdtrim.methods.problem import Problem
from pdtrim.models.block import OUTPUTS
from pdtrim.models.model import Model
from pdtrim.models.narrow import channels
from pdtrim.models.swap import Blocks, Weights
from pdtrim.plan import STAGES
from pdtrim.progress import Progress
from pdtrim.stage.forward import Batch


def fluctuation(variance_F: Tensor, weight_EF: Tensor) -> Tensor:
    """Variance of each input channel times the squared length of its weights, ``[F]``."""
    return variance_F * weight_EF.square().sum(0)


def standardised(metric_F: Tensor) -> Tensor:
    """Shifted and scaled to mean 0 and standard deviation 1, ``[F]``; 0 where all are equal."""
    spread = metric_F.std(correction=0)
    return (metric_F - metric_F.mean()) / torch.where(spread > 0, spread, 1)


def flap_scores(o_F: Tensor, down_F: Tensor, num_groups: int) -> UnitScores:
    """Scores of a block's units from the fluctuation of the channels of o and of down."""
    channels_F = standardised(o_F.square())
    size = len(channels_F) // num_groups
    return UnitScores(
        groups_G=group_sums(channels_F, num_groups) / size, neurons_F=standardised(down_F)
    )


def compensation(weight_EF: Tensor, mean_F: Tensor, cut: Sequence[int]) -> Tensor:
    """What the cut channels add to the output on average, ``[E]``."""
    return weight_EF[:, list(cut)].to(mean_F) @ mean_F[list(cut)]


@dataclass(frozen=True, kw_only=True)
class FLAP(WidthMethod):
    """Settings: whether what was cut leaves its mean behind."""

    name = "flap"
    passes = 1
    paper_calibration = PaperCalibration(source="WikiText2 train", sequences=1024, tokens=128)
    bias: bool = True

    @torch.no_grad()
    def choose(self, problem: Problem, costs: Costs) -> Narrowed:
        """See the module's docstring."""
        model, batch, progress = problem.model, problem.batch, problem.progress
        moments = _dense_moments(model, batch, progress)
        scores = {layer: _scores(model, layer, *moments[layer]) for layer in moments}
        lost = each_ranked(self.name, model, costs, scores, biased=self.bias)
        blocks: Blocks = {}
        if self.bias:
            for stage in STAGES:
                blocks[stage] = {
                    layer: _biases(model, layer, units, *moments[layer])
                    for layer, units in sorted(lost[stage].items())
                    if costs[stage].layers[layer].whole
                }
        return Narrowed(lost=lost, blocks=blocks)


def _dense_moments(
    model: Model, batch: Batch, progress: Progress
) -> dict[int, tuple[Moments, Moments]]:
    """By layer, of what o and down read in the dense model."""
    with ExitStack() as stack:
        moments = {
            layer: stack.enter_context(watched(model.block(layer)))
            for layer in range(model.num_layers)
        }
        with progress("fluctuation", len(batch)) as advance:
            for flows in each_residuals(model, batch):
                advance(len(flows[0]))
    return moments


def _scores(model: Model, layer: int, attention: Moments, mlp: Moments) -> UnitScores:
    o, down = (model.block(layer).matrix(made) for made in OUTPUTS)
    return flap_scores(
        fluctuation(attention.variance_F, o.weight.double()),
        fluctuation(mlp.variance_F, down.weight.double()),
        model.num_kv_heads,
    )


def _biases(model: Model, layer: int, lost: Units, attention: Moments, mlp: Moments) -> Weights:
    """Biases of both output projections, the model's own included."""
    heads_F = channels(lost.groups, len(attention.mean_F) // model.num_kv_heads)
    block = model.block(layer)
    made: Weights = {}
    for output, seen, cut in zip(OUTPUTS, (attention, mlp), (heads_F, lost.neurons), strict=True):
        projection = block.matrix(output)
        bias_E = compensation(projection.weight, seen.mean_F, cut)
        if projection.bias is not None:
            bias_E = bias_E + projection.bias
        made[f"{block.making(output).name}.bias"] = bias_E.to(projection.weight.dtype)
    return made
