"""What the methods that make blocks narrower share: units, shares, modes, budgets.

A unit is a KV group, which is a KV head with all query heads that read it (rows of q, k and v,
columns of o), or an MLP neuron (a row of gate and of up, a column of down). At least one of each
stays in every block. A stage loses a share of the parameters of the blocks that its dense
checkpoint holds, to within one neuron; embeddings and head do not count.

* Mode ``unified``, their default: both stages lose the same units, the share being decode's.
  Prefill's checkpoint may lose a little more or less: of its last block it holds little but keys
  and values.
* Mode ``subset``: decode loses its share, and prefill those of these units that the method would
  cut first. So a head that decode keeps, prefill keeps too. Where too few neurons are among them,
  prefill loses up to a group more than its share. Equal shares are mode ``unified``.

Rankings see the whole KV cache; the target's KV policy is written into the plan unseen.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

from torch import Tensor

from pdtrim.errors import PlanError
from pdtrim.finite import finite
from pdtrim.methods.base import Found, Method
from pdtrim.methods.baselines.base import PaperCalibration
from pdtrim.methods.baselines.residuals import dense_cost
from pdtrim.methods.problem import Problem
from pdtrim.models.block import OUTPUTS, Block
from pdtrim.models.checkpoint import held_parts
from pdtrim.models.model import Model
from pdtrim.models.swap import Blocks
from pdtrim.plan import STAGES, Gates, LayerKV, Mode, Stage, Width, Widths

ROUNDING = 1e-9  # of a share, which is a float, times a count of parameters
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Units:
    """Units of one block by their dense index, the most removable first."""

    groups: tuple[int, ...] = ()
    neurons: tuple[int, ...] = ()

    def first(self, groups: int, neurons: int) -> Units:
        """So many of each."""
        return Units(groups=self.groups[:groups], neurons=self.neurons[:neurons])


Lost = Mapping[int, Units]
"""What a stage loses, by layer."""


@dataclass(frozen=True, kw_only=True)
class UnitScores:
    """Importance of the units of one block: ``groups_G`` of G KV groups, ``neurons_F`` of F."""

    groups_G: Tensor
    neurons_F: Tensor

    def order(self) -> Units:
        """All units, the least important first; equals by their index."""
        groups, neurons = (
            tuple(finite(scores, "the score of a unit").cpu().argsort(stable=True).tolist())
            for scores in (self.groups_G, self.neurons_F)
        )
        return Units(groups=groups, neurons=neurons)


def group_sums(channels_F: Tensor, num_groups: int) -> Tensor:
    """Sums ``[G]`` over each KV group's channels; query heads of a group lie side by side."""
    return channels_F.view(num_groups, -1).sum(1)


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """Parameters of one block in one stage's checkpoint.

    Attributes:
        group, neuron: what the loss of one unit saves.
        bias: what biases on both output projections add, where the model has none there.
        whole: whether the stage runs attention and MLP, and so both projections.
    """

    group: int
    neuron: int
    bias: int
    whole: bool


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """Parameters of a stage's blocks, by layer, and how many of them it must lose.

    Attributes:
        held: of all its blocks.
        share: of these that it must lose.
    """

    stage: Stage
    layers: tuple[LayerCost, ...]
    held: int
    share: float

    @property
    def needed(self) -> int:
        """The fewest parameters that make up the share."""
        return math.ceil(self.share * self.held * (1 - ROUNDING))

    def saved(self, lost: Mapping[int, tuple[int, int]]) -> int:
        """Parameters of so many groups and neurons by layer."""
        return sum(
            groups * self.layers[layer].group + neurons * self.layers[layer].neuron
            for layer, (groups, neurons) in lost.items()
        )

    def refuse(self, name: str, most: int) -> PlanError:
        """What to tell a user who wants more than the method can take."""
        inside = " inside what decode loses" if self.stage == "prefill" else ""
        return PlanError(
            f"method '{name}' can take at most {most / self.held:.3f} of the parameters of"
            f" {self.stage}'s blocks{inside}, not {self.share:g}: ask {self.stage} for less"
        )


def stage_cost(
    model: Model, gates: Gates, rules: tuple[LayerKV, ...], stage: Stage, share: float
) -> StageCost:
    """Count what a stage's dense checkpoint holds.

    Args:
        rules: the KV policy; a selector that reads queries has prefill hold what makes them.
    """
    layers, held = [], 0
    for layer, (attention, mlp) in enumerate(zip(*gates.of(stage), strict=True)):
        parts = tuple(f"{part}." for part in held_parts(model.config, gates, rules, stage, layer))
        size = {
            name: weight.numel()
            for name, weight in model.block(layer).module.named_parameters()
            if name.startswith(parts)
        }
        whole = attention in ("full", True) and mlp
        block = model.block(layer)
        outputs = [block.making(made).name for made in OUTPUTS] if whole else ()
        bare = sum(f"{name}.bias" not in size for name in outputs)
        group = _cut(size, block, "group") // model.num_kv_heads
        neuron = _cut(size, block, "neuron") // model.config.intermediate_size
        bias = bare * model.config.hidden_size
        layers.append(LayerCost(group=group, neuron=neuron, bias=bias, whole=whole))
        held += sum(size.values())
    return StageCost(stage=stage, layers=tuple(layers), held=held, share=share)


def _cut(size: Mapping[str, int], block: Block, unit: str) -> int:
    """Parameters of all units of a kind; a bias is part of a row, but not of a column."""
    of_kind = [projection for projection in block.PROJECTIONS if projection.unit == unit]
    names = [f"{projection.name}.weight" for projection in of_kind]
    names += [f"{projection.name}.bias" for projection in of_kind if not projection.writes]
    return sum(size.get(name, 0) for name in names)


Costs = Mapping[Stage, StageCost]


def each_stage(costs: Costs, pick: Callable[[StageCost, T | None], T]) -> dict[Stage, T]:
    """Decode's choice, and prefill's inside it; equal shares are one choice.

    Args:
        pick: called with a stage's cost, and for prefill with what was picked for decode.
    """
    decode = pick(costs["decode"], None)
    same = costs["prefill"].share == costs["decode"].share
    return {"prefill": decode if same else pick(costs["prefill"], decode), "decode": decode}


def width_without(model: Model, lost: Units, *, biased: bool = False) -> Width | None:
    """The width of a block that loses these units; None if it loses none."""
    if not lost.groups and not lost.neurons:
        return None
    num_neurons = model.config.intermediate_size
    return Width.of(
        groups=set(range(model.num_kv_heads)) - set(lost.groups),
        neurons=set(range(num_neurons)) - set(lost.neurons),
        num_neurons=num_neurons,
        biased=biased,
    )


@dataclass(frozen=True, kw_only=True)
class Narrowed:
    """What each stage loses, and biases for the output projections of blocks that do."""

    lost: Mapping[Stage, Lost]
    blocks: Blocks = field(default_factory=dict)


class WidthMethod(Method):
    """A method of the literature that makes blocks narrower. Subclasses implement :meth:`choose`.

    Attributes:
        passes: of the dense model over the text, in which the method pays.
    """

    default_mode = "unified"
    modes: ClassVar[tuple[Mode, ...]] = ("unified", "subset")
    grains = ("block",)
    metrics = ("parameters",)
    passes: ClassVar[int]
    paper_calibration: ClassVar[PaperCalibration]

    @abstractmethod
    def choose(self, problem: Problem, costs: Costs) -> Narrowed:
        """The units that each stage loses.

        Raises:
            PlanError: there are not enough of them.
        """

    def solve(self, problem: Problem) -> Found:
        """Rank, unless nothing is to be cut."""
        model, target = problem.model, problem.target
        if target.prefill_share > target.decode_share:
            raise PlanError(
                f"method '{self.name}' cuts prefill inside what decode loses: prefill cannot lose"
                f" {target.prefill_share:g} when decode loses {target.decode_share:g}"
            )
        gates = Gates.dense(model.num_layers).without_dead_work()
        if not target.decode_share:
            return Found(gates=gates, block_tokens=0)
        shares: dict[Stage, float] = {
            "prefill": target.prefill_share,
            "decode": target.decode_share,
        }
        costs = {
            stage: stage_cost(model, gates, problem.rules, stage, shares[stage]) for stage in STAGES
        }
        spent = dense_cost(problem, self.passes)
        made = self.choose(problem, costs)
        return Found(
            gates=gates, block_tokens=spent, widths=_widths(model, made), blocks=made.blocks
        )


def _widths(model: Model, made: Narrowed) -> Widths:
    def of(stage: Stage) -> tuple[Width | None, ...]:
        biases, lost = made.blocks.get(stage, {}), made.lost[stage]
        return tuple(
            width_without(model, lost.get(layer, Units()), biased=layer in biases)
            for layer in range(model.num_layers)
        )

    return Widths(prefill=of("prefill"), decode=of("decode"))
