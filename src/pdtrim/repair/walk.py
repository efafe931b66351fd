"""The pruned pair on its way through the layers, repaired as it goes, beside the dense streams.

Up to the first layer in which the pair differs from the dense model its streams are the dense
ones, which are there already: the way begins at the layer before, in which a cut is made up for.

Shapes: B sequences of a part of the text, N tokens that prefill reads of one, R tokens of a part, E
hidden width, F input channels of a projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from pdtrim.models.block import Made
from pdtrim.models.hooks import reading
from pdtrim.models.model import Model
from pdtrim.models.swap import Blocks, Weights
from pdtrim.plan import STAGES, Gates, LayerKV, Stage
from pdtrim.repair.cuts import Cut, readers
from pdtrim.repair.dense import DenseText
from pdtrim.repair.run import rows, run
from pdtrim.stage.forward import Trimmed
from pdtrim.stage.swap import swap_pair


class Walk:
    """The pair's streams, part by part of the text, from layer to layer.

    Only the streams that enter the current layer are held, beside the dense ones.

    Args:
        start: the pair as it is pruned.
        text: what is fitted to.
        stages: whose streams are wanted: prefill's run alone without decode's.

    Attributes:
        trimmed: the pair with the repairs so far in place.
        made: weights that were swapped in so far.
    """

    def __init__(self, start: Trimmed, text: DenseText, stages: Sequence[Stage] = STAGES) -> None:
        self.model, self.trimmed, self.gates = text.model, start, start.gates
        self.parts, self.dense = text.batches, text.parts
        self.made: Blocks = {"prefill": {}, "decode": {}}
        decode = "decode" in stages
        self.at = max(same_layers(text.model, start, decode=decode) - 1, 0)
        entries = [dense.entry(self.at) for dense in self.dense]
        self.here = [(x_BNE, y_BCE if decode else None) for x_BNE, y_BCE in entries]

    def go_to(self, layer: int) -> None:
        """Run on to the streams that enter a layer; what lies behind cannot be reached again."""
        assert layer >= self.at, f"layer {layer} lies behind layer {self.at}"
        if layer == self.at:
            return
        self.here = [
            run(self.trimmed, part, entry, self.at, layer)
            for part, entry in zip(self.parts, self.here, strict=True)
        ]
        self.at = layer

    def streams_and_targets(
        self, stage: Stage, targets: tuple[int, ...]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The stream of a stage here and the dense one at the readers, ``[R, E]``, part by part."""
        for entry, dense in zip(self.here, self.dense, strict=True):
            yield rows(entry, stage), dense.target(stage, targets)

    def outputs_and_targets(self, cut: Cut) -> Iterator[tuple[Tensor, Tensor]]:
        """What the MLP of this layer writes, and what it should write, ``[R, E]``, part by part."""
        block = self.trimmed.pair.of(cut.stage).block(self.at)
        for y_RE, t_RE in self._without_mlp(cut.stage, cut.readers):
            yield block.mlp(y_RE[None])[0], t_RE - y_RE.float()

    def down_and_targets(self, stage: Stage) -> Iterator[tuple[Tensor, Tensor]]:
        """What the down projection reads ``[R, F]`` and should write ``[R, E]``, part by part."""
        block = self.trimmed.pair.of(stage).block(self.at)
        behind = readers(self.gates, stage, self.at)
        with reading(block.matrix("mlp")) as seen:
            for y_RE, t_RE in self._without_mlp(stage, behind):
                block.mlp(y_RE)
                yield seen[-1], t_RE - y_RE.float()
                seen.clear()

    def o_and_targets(self, stage: Stage) -> Iterator[tuple[Tensor, Tensor]]:
        """What attention's output projection reads and should write, likewise."""
        runs_mlp = self.gates.of(stage)[1][self.at]
        behind = readers(self.gates, stage, self.at)
        side = 0 if stage == "prefill" else -1
        bare = self._bare(*STAGES)
        with reading(self.trimmed.pair.of(stage).block(self.at).matrix("attention")) as seen:
            for part, entry, dense in zip(self.parts, self.here, self.dense, strict=True):
                t_RE = dense.middle(stage, self.at) if runs_mlp else dense.target(stage, behind)
                seen.clear()  # the dense model may have run this very module
                run(bare, part, entry, self.at, self.at + 1)
                x_RF = seen[side].flatten(0, 1)  # as both stages may; prefill comes first
                yield x_RF, t_RE - rows(entry, stage).float()

    def normed_and_targets(self) -> Iterator[tuple[Tensor, Tensor]]:
        """A prefill block's normed input here and in the dense one, ``[B, N, E]``, part by part."""
        norm = self.model.block(self.at).attention_norm
        for (x_BNE, _), dense in zip(self.here, self.dense, strict=True):
            yield norm(x_BNE), norm(dense.entry(self.at)[0])

    def weights(self, stage: Stage, layer: int, *made: Made) -> Weights:
        """Parameters of a block's projections that make these, as the pair has them now."""
        return self.trimmed.pair.of(stage).block(layer).parameters_of(*made)

    def swap(self, stage: Stage, layer: int, weights: Weights) -> None:
        """Put other weights in place."""
        self.made[stage].setdefault(layer, {}).update(weights)
        pair = swap_pair(self.trimmed.pair, {stage: {layer: weights}})
        self.trimmed = replace(self.trimmed, pair=pair)

    def _bare(self, *stages: Stage) -> Trimmed:
        """The pair without this layer's MLP in some stages."""
        gates = self.gates
        for stage in stages:
            off = tuple(on and layer != self.at for layer, on in enumerate(gates.of(stage)[1]))
            gates = gates.model_copy(update={f"{stage}_mlp": off})
        return replace(self.trimmed, gates=gates)

    def _without_mlp(
        self, stage: Stage, behind: tuple[int, ...]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The stream that this layer's MLP reads, and the dense one at its readers, ``[R, E]``."""
        bare = self._bare(stage)
        for part, entry, dense in zip(self.parts, self.here, self.dense, strict=True):
            y_RE = rows(run(bare, part, entry, self.at, self.at + 1), stage)
            yield y_RE, dense.target(stage, behind)


def same_layers(model: Model, trimmed: Trimmed, *, decode: bool = True) -> int:
    """How many first layers of a pair do just what the dense model's do.

    Args:
        decode: whether decode's streams count too, and with them what travels.
    """
    pair, gates, dense = trimmed.pair, trimmed.gates, Gates.dense(model.num_layers)
    stages: tuple[Stage, ...] = STAGES if decode else ("prefill",)
    ends = {"prefill": gates.last_read, "decode": model.num_layers}
    for layer in range(min(ends[stage] for stage in stages)):
        for stage in stages:
            parts = [side[layer] for side in gates.of(stage)]
            if parts != [side[layer] for side in dense.of(stage)]:
                return layer
            if pair.of(stage).block(layer).module is not model.block(layer).module:
                return layer
        if decode and trimmed.policy.rules[layer] != LayerKV():
            return layer
    return min(ends[stage] for stage in stages)
