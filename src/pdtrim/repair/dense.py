"""The dense model's streams on a text, run once and kept for every fit that is aimed at them.

They take two numbers of the stream's width a token and layer: where 9,000 tokens are fitted to,
about a fifth of what an 8B model's weights take.

Shapes: B sequences of a part, N prefilled and C decoded tokens of one, E hidden width, R tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pdtrim.models.hooks import reading
from pdtrim.models.model import Model
from pdtrim.plan import STAGES, Stage
from pdtrim.repair.run import Entering, rows, run, streams_into
from pdtrim.stage.forward import Batch, Trimmed

ROWS = 8  # sequences run together


class DenseText:
    """A text in parts, with the dense model's streams on each, made as they are asked for.

    Args:
        batches: each of one length; their parts are fitted to together.
        stages: whose streams are wanted: prefill's run alone without decode's.
    """

    def __init__(self, model: Model, *batches: Batch, stages: Sequence[Stage] = STAGES) -> None:
        self.model, self.stages = model, tuple(stages)
        self.batches = [part for batch in batches for part in batch.to(model.device).parts(ROWS)]
        self.parts = [DensePart(model, part, decode="decode" in stages) for part in self.batches]


class DensePart:
    """The streams of one part."""

    def __init__(self, model: Model, part: Batch, *, decode: bool) -> None:
        self.trimmed, self.part = Trimmed.dense(model), part
        self.entries = [streams_into(self.trimmed.pair, part, decode=decode)]
        self.middles: dict[tuple[Stage, int], Tensor] = {}

    def entry(self, layer: int) -> Entering:
        """The streams that enter a layer; the number of layers stands for the head."""
        for i in range(len(self.entries) - 1, layer):
            self._step(i)
        return self.entries[layer]

    def target(self, stage: Stage, layers: tuple[int, ...]) -> Tensor:
        """Mean of a stage's streams that enter some layers, ``[R, E]``, fp32."""
        return torch.stack([rows(self.entry(i), stage).float() for i in layers]).mean(0)

    def middle(self, stage: Stage, layer: int) -> Tensor:
        """A stage's stream between a layer's attention and its MLP, ``[R, E]``, fp32."""
        self.entry(layer + 1)
        return self.middles[stage, layer].flatten(0, 1).float()

    def _step(self, layer: int) -> None:
        with reading(self.trimmed.pair.prefill.block(layer).mlp_norm) as seen:
            self.entries.append(run(self.trimmed, self.part, self.entries[layer], layer, layer + 1))
        # in the order in which the stages run; prefill does not run the last layer's MLP
        if self.entries[layer][1] is not None:
            self.middles["decode", layer] = seen.pop()
        if seen:
            self.middles["prefill", layer] = seen[0]
