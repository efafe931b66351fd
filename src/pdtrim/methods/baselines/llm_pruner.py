"""``llm-pruner`` and ``llm-pruner-vector``: Taylor scores of units (LLM-Pruner, 2305.11627).

With w a weight, g its gradient of the mean NLL a token, and A the mean over sequences of the square
of the gradient of one sequence alone, a row or column of a matrix scores::

    element   sum | w g |                           ("Element 1" of the paper, its default)
    element2  sum | w g - w^2 A / 2 |               ("Element 2")
    vector    | sum w g |

A unit's score is the sum over its rows and columns: for an MLP neuron a row of gate, a row of up
and a column of down; for a KV group the rows of its keys, of its values and of the queries that
read them, and the columns of o behind these. Units of the lowest score go, all at once, at one
ratio in every block but the first 4 and the last 2, as in the paper on models of 32 blocks; they
stay whole, so the others lose more than the share asked for.

The paper calibrates on 10 sequences of 64 tokens of BookCorpus and then trains with LoRA. Different
here: the text is the user's and nothing is trained. With grouped queries the authors' code adds up
queries h, h + G, h + 2G, ... for KV head h of G; here they are those that read it, side by side. A
row's bias, which the paper's models do not have, is part of the row. The ratio of groups is rounded
and neurons make up for it (``uniform.py``).

Shapes: U units, or rows and columns of them, I elements of one, G KV groups, F MLP neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pdtrim.errors import PlanError
from pdtrim.methods.baselines.base import PaperCalibration
from pdtrim.methods.baselines.gradients import (
    PASSES,
    add_gradients,
    gradients_and_squares,
    wanting_gradients,
)
from pdtrim.methods.baselines.uniform import each_uniform, without_first
from pdtrim.methods.baselines.width import Costs, Narrowed, UnitScores, WidthMethod
from pdtrim.methods.problem import Problem
from pdtrim.models.block import Block, Projection
from pdtrim.models.model import Model
from pdtrim.stage.forward import Batch

Criterion = Literal["element", "element2", "vector"]
Read = Callable[[nn.Parameter], Tensor]


def element_scores(w_UI: Tensor, g_UI: Tensor) -> Tensor:
    """Sum of |w g| over the elements of each row, ``[U]``."""
    return (w_UI * g_UI).abs().sum(1)


def element2_scores(w_UI: Tensor, g_UI: Tensor, a_UI: Tensor) -> Tensor:
    """Sum of |w g - w^2 A / 2| over the elements of each row, ``[U]``; A is ``a_UI``."""
    return (w_UI * g_UI - w_UI.square() * a_UI / 2).abs().sum(1)


def vector_scores(w_UI: Tensor, g_UI: Tensor) -> Tensor:
    """|Sum of w g| over the elements of each row, ``[U]``."""
    return (w_UI * g_UI).sum(1).abs()


def unit_scores(block: Block, scores: Mapping[Projection, Tensor]) -> UnitScores:
    """Sum what the rows and columns of a block scored over its units.

    Args:
        scores: by projection, those of its rows or, for output projections, of its columns.
    """
    of_unit: dict[str, list[Tensor]] = {"group": [], "neuron": []}
    for projection, lines in scores.items():
        for channels in block.units(projection):
            of_unit[projection.unit].append(lines[channels].sum(1))
    groups_G, neurons_F = (torch.stack(parts).sum(0) for parts in of_unit.values())
    return UnitScores(groups_G=groups_G, neurons_F=neurons_F)


def taylor_units(
    model: Model, batch: Batch, layers: Sequence[int], criterion: Criterion
) -> dict[int, UnitScores]:
    """Scores of each layer's units for the mean NLL of all tokens; the model is left as it was."""
    blocks = {layer: model.block(layer) for layer in layers}
    weights = [
        weight
        for block in blocks.values()
        for projection in block.PROJECTIONS
        for weight in block.matrix(projection.makes[0]).parameters()
    ]
    with wanting_gradients(weights):
        squares: dict[nn.Parameter, Tensor] = {}
        if criterion == "element2":
            squares = gradients_and_squares(model, batch, weights)
        else:
            add_gradients(model, batch, weights)
        with torch.no_grad():
            return {
                layer: unit_scores(
                    block, {p: _score(block, p, criterion, squares) for p in block.PROJECTIONS}
                )
                for layer, block in blocks.items()
            }


def _score(
    block: Block,
    projection: Projection,
    criterion: Criterion,
    squares: Mapping[nn.Parameter, Tensor],
) -> Tensor:
    """Scores of a projection's rows, or of an output projection's columns."""
    matrix: Any = block.matrix(projection.makes[0])

    def lines_UI(read: Read) -> Tensor:
        weight = read(matrix.weight).float()
        if projection.writes:
            return weight.T  # its bias belongs to no unit
        if matrix.bias is None:
            return weight
        return torch.cat((weight, read(matrix.bias).float()[:, None]), dim=1)

    def gradient(weight: nn.Parameter) -> Tensor:
        assert weight.grad is not None
        return weight.grad

    w_UI, g_UI = lines_UI(lambda weight: weight), lines_UI(gradient)
    if criterion == "element2":
        return element2_scores(w_UI, g_UI, lines_UI(lambda weight: squares[weight]))
    return element_scores(w_UI, g_UI) if criterion == "element" else vector_scores(w_UI, g_UI)


@dataclass(frozen=True, kw_only=True)
class LLMPruner(WidthMethod):
    """Settings: how many blocks at each end stay whole, and the score."""

    name = "llm-pruner"
    passes = PASSES
    paper_calibration = PaperCalibration(source="BookCorpus", sequences=10, tokens=64)
    protect_first: int = 4
    protect_last: int = 2
    criterion: Criterion = "element"

    def choose(self, problem: Problem, costs: Costs) -> Narrowed:
        """See the module's docstring."""
        model, batch, progress = problem.model, problem.batch, problem.progress
        layers = self._open_layers(model.num_layers)
        counts = each_uniform(self.name, model, costs, layers)
        with progress("Taylor scores", 1):
            scores = taylor_units(model, batch, layers, self.criterion)
        return without_first({layer: scores[layer].order() for layer in layers}, counts)

    def _open_layers(self, num_layers: int) -> range:
        layers = range(self.protect_first, num_layers - self.protect_last)
        if not layers:
            raise PlanError(
                f"method '{self.name}' protects the first {self.protect_first} and the last"
                f" {self.protect_last} of {num_layers} blocks, so none can become narrower: change"
                " its settings"
            )
        return layers


@dataclass(frozen=True, kw_only=True)
class LLMPrunerVector(LLMPruner):
    """The same with the score ``vector``."""

    name = "llm-pruner-vector"
    criterion: Criterion = "vector"
