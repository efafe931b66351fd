"""The pruned pair on its way through the layers, repaired as it goes, beside the dense streams.

Shapes: R tokens of a part of the text, E hidden width, F input channels of a projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pdtrim.models.block import Made
from pdtrim.models.model import Model
from pdtrim.models.swap import Blocks, Weights
from pdtrim.plan import Gates, LayerKV, Stage
from pdtrim.repair.cuts import Cut, readers
from pdtrim.stage.forward import Batch, Pair, Trimmed
from pdtrim.stage.swap import swap_pair

ROWS = 8  # sequences run together
Entry = tuple[Tensor, Tensor]
"""Streams that enter a layer: prefill's ``[B, N, E]`` and decode's ``[B, C, E]``."""


class Walk:
    """The pair's streams and the dense model's, part by part of the text, from layer to layer.

    Only the streams that enter the current layer are held, and dense ones from it up to the last
    that was asked for.

    Args:
        model: the dense model.
        start: the pair as it is pruned.

    Attributes:
        trimmed: the pair with the repairs so far in place.
        made: weights that were swapped in so far.
    """

    def __init__(self, model: Model, start: Trimmed, batch: Batch) -> None:
        self.model, self.trimmed, self.gates = model, start, start.gates
        batch = batch.to(model.device)
        self.parts = [batch[i : i + ROWS] for i in range(0, len(batch), ROWS)]
        self.made: Blocks = {"prefill": {}, "decode": {}}
        self.begin()

    def begin(self) -> None:
        """Go to the first layer, with the repairs so far in place."""
        self.at = 0
        self.here = [streams_into(self.trimmed.pair, part) for part in self.parts]
        self.dense = [_Dense(self.model, part) for part in self.parts]

    def go_to(self, layer: int) -> None:
        """Run on to the streams that enter a layer."""
        if layer == self.at:
            return
        self.here = [
            _run(self.trimmed, part, entry, self.at, layer)
            for part, entry in zip(self.parts, self.here, strict=True)
        ]
        self.at = layer
        for dense in self.dense:
            dense.forget(layer)

    def streams_and_targets(
        self, stage: Stage, targets: tuple[int, ...]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The stream of a stage here and the dense one at the readers, ``[R, E]``, part by part."""
        for entry, dense in zip(self.here, self.dense, strict=True):
            yield _rows(entry, stage), dense.target(stage, targets)

    def outputs_and_targets(self, cut: Cut) -> Iterator[tuple[Tensor, Tensor]]:
        """What the MLP of this layer writes, and what it should write, ``[R, E]``, part by part."""
        block = self._model(cut.stage).block(self.at)
        for y_RE, t_RE in self._without_mlp(cut.stage, cut.readers):
            yield block.mlp(y_RE[None])[0], t_RE - y_RE.float()

    def down_and_targets(self, stage: Stage) -> Iterator[tuple[Tensor, Tensor]]:
        """What the down projection reads ``[R, F]`` and should write ``[R, E]``, part by part."""
        block = self._model(stage).block(self.at)
        behind = readers(self.gates, stage, self.at)
        with _reading(block.matrix("mlp")) as seen:
            for y_RE, t_RE in self._without_mlp(stage, behind):
                block.mlp(y_RE)
                yield seen[-1], t_RE - y_RE.float()
                seen.clear()

    def o_and_targets(self, stage: Stage) -> Iterator[tuple[Tensor, Tensor]]:
        """What attention's output projection reads and should write, likewise."""
        runs_mlp = self.gates.of(stage)[1][self.at]
        behind = readers(self.gates, stage, self.at)
        side = 0 if stage == "prefill" else -1
        with _reading(self._model(stage).block(self.at).matrix("attention")) as seen:
            for part, entry, dense in zip(self.parts, self.here, self.dense, strict=True):
                t_RE = dense.middle(stage, self.at) if runs_mlp else dense.target(stage, behind)
                seen.clear()  # the dense model may have run this very module
                _run(self.trimmed, part, entry, self.at, self.at + 1)
                x_RF = seen[side].flatten(0, 1)  # as both stages may; prefill comes first
                yield x_RF, t_RE - _rows(entry, stage).float()

    def normed_and_targets(self) -> Iterator[tuple[Tensor, Tensor]]:
        """A prefill block's normed input here and in the dense model, ``[R, E]``, part by part."""
        norm = self.model.block(self.at).attention_norm
        for entry, dense in zip(self.here, self.dense, strict=True):
            yield norm(_rows(entry, "prefill")), norm(_rows(dense.entry(self.at), "prefill"))

    def weights(self, stage: Stage, layer: int, *made: Made) -> Weights:
        """Parameters of a block's projections that make these, as the pair has them now."""
        return self._model(stage).block(layer).parameters_of(*made)

    def swap(self, stage: Stage, layer: int, weights: Weights) -> None:
        """Put other weights in place."""
        self.made[stage].setdefault(layer, {}).update(weights)
        pair = swap_pair(self.trimmed.pair, {stage: {layer: weights}})
        self.trimmed = replace(self.trimmed, pair=pair)

    def _model(self, stage: Stage) -> Model:
        pair = self.trimmed.pair
        return pair.prefill if stage == "prefill" else pair.decode

    def _without_mlp(
        self, stage: Stage, behind: tuple[int, ...]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The stream that this layer's MLP reads, and the dense one at its readers, ``[R, E]``."""
        off = tuple(on and layer != self.at for layer, on in enumerate(self.gates.of(stage)[1]))
        bare = replace(self.trimmed, gates=self.gates.model_copy(update={f"{stage}_mlp": off}))
        for part, entry, dense in zip(self.parts, self.here, self.dense, strict=True):
            y_RE = _rows(_run(bare, part, entry, self.at, self.at + 1), stage)
            yield y_RE, dense.target(stage, behind)


class _Dense:
    """The dense model's streams of one part of the text, run on as far as they are asked for."""

    def __init__(self, model: Model, part: Batch) -> None:
        self.trimmed, self.part = Trimmed.dense(model), part
        self.entries = {0: streams_into(self.trimmed.pair, part)}
        self.middles: dict[tuple[Stage, int], Tensor] = {}

    def entry(self, layer: int) -> Entry:
        """The streams that enter a layer; the number of layers stands for the head."""
        for i in range(max(self.entries), layer):
            self._step(i)
        return self.entries[layer]

    def target(self, stage: Stage, layers: tuple[int, ...]) -> Tensor:
        """Mean of a stage's streams that enter some layers, ``[R, E]``, fp32."""
        return torch.stack([_rows(self.entry(i), stage).float() for i in layers]).mean(0)

    def middle(self, stage: Stage, layer: int) -> Tensor:
        """A stage's stream between a layer's attention and its MLP, ``[R, E]``, fp32."""
        self.entry(layer + 1)
        return self.middles[stage, layer].flatten(0, 1).float()

    def forget(self, layer: int) -> None:
        """Drop what lies before a layer."""
        self.entry(layer)
        self.entries = {i: entry for i, entry in self.entries.items() if i >= layer}
        self.middles = {key: middle for key, middle in self.middles.items() if key[1] >= layer}

    def _step(self, layer: int) -> None:
        norm = self.trimmed.pair.prefill.block(layer).module.post_attention_layernorm
        with _reading(norm) as seen:
            self.entries[layer + 1] = _run(
                self.trimmed, self.part, self.entries[layer], layer, layer + 1
            )
        # in the order in which the stages run; prefill does not run the last layer's MLP
        self.middles |= {("decode", layer): seen[-1], ("prefill", layer): seen[0]}


def streams_into(pair: Pair, part: Batch) -> Entry:
    """The streams that enter layer 0."""
    return pair.prefill.embed(part.prefill_ids_BN), pair.decode.embed(part.decode_ids_BC)


def _run(trimmed: Trimmed, part: Batch, entry: Entry, start: int, stop: int) -> Entry:
    """The streams that enter layer ``stop``, from those that enter ``start``."""
    if stop < trimmed.gates.num_layers:
        policy = trimmed.policy
        policy = replace(policy, rules=(*policy.rules[:stop], LayerKV()))
        trimmed = replace(trimmed, gates=_ending(trimmed.gates, stop), policy=policy)
    return trimmed.streams(part, resume=[entry] * (start + 1), start=start)[stop]


@contextmanager
def _reading(*modules: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, what the modules read is appended to a list."""
    seen: list[Tensor] = []

    def note(module: Any, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    hooks = [module.register_forward_pre_hook(note) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _ending(gates: Gates, stop: int) -> Gates:
    """Gates of the layers before ``stop``, and a reader there: without one prefill would stop."""
    return Gates(
        prefill_attention=(*gates.prefill_attention[:stop], "kv"),
        prefill_mlp=(*gates.prefill_mlp[:stop], False),
        decode_attention=(*gates.decode_attention[:stop], True),
        decode_mlp=(*gates.decode_mlp[:stop], False),
    )


def _rows(entry: tuple[Tensor, Tensor], stage: Stage) -> Tensor:
    """A stage's stream of a trace entry, all sequences below one another, ``[R, E]``."""
    return entry[0 if stage == "prefill" else 1].flatten(0, 1)
