"""Keys and values of skipped blocks, fitted before the search knows which blocks are skipped.

A search that measures pairs as they are cut takes other blocks than one that measures them as they
will be repaired. Where a run of blocks is skipped, all read the stream that stood still before the
first of them; so block l that reads the stream which enters layer s has the projections of
``repair/kv.py``, fitted to the dense model's streams at s and l. There are at most L (L - 1) / 2
such pairs of layers. Each is fitted when a state first asks for it, and then costs a state nothing.

What blocks before s no longer add is not made up for here: the repair of the states that the search
ends with does that, on the streams of the pruned pair.

The fits take 2 F E numbers a pair of layers, F being the width of all KV heads: 0.6 GB if a search
asked for every pair of a model of 1.5B parameters in bf16, 8 GB of one of 8B.

Shapes: B sequences, N tokens, E hidden width, F width of all KV heads, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pdtrim.models.block import KEYS_AND_VALUES
from pdtrim.models.swap import Weights
from pdtrim.plan import Gates
from pdtrim.repair import kv
from pdtrim.repair.cuts import writes
from pdtrim.repair.dense import DenseText
from pdtrim.stage.forward import Pair
from pdtrim.stage.swap import swap_pair

KEPT = 64
"""Pairs kept, of states that a search may come back to."""


class Ahead:
    """Makes the pair that runs under some gates.

    Args:
        pair: as it is before any block is skipped.
        text: what is fitted to; prefill's streams of it.
    """

    def __init__(self, pair: Pair, text: DenseText, *, ridge: float) -> None:
        self.plain, self.text, self.ridge = pair, text, ridge
        self.fits: dict[tuple[int, int], Weights] = {}
        self.pairs: dict[tuple[tuple[int, int], ...], Pair] = {}

    @torch.inference_mode(False)
    @torch.no_grad()
    def pair(self, gates: Gates) -> Pair:
        """The pair, with the fits of the blocks that read an earlier layer's stream.

        Args:
            gates: without dead work.
        """
        wanted = tuple(sources(gates).items())
        if not wanted:
            return self.plain
        if wanted not in self.pairs:
            if len(self.pairs) == KEPT:
                del self.pairs[next(iter(self.pairs))]
            blocks = {layer: self._fit(layer, source) for layer, source in wanted}
            self.pairs[wanted] = swap_pair(self.plain, {"prefill": blocks})
        return self.pairs[wanted]

    def _fit(self, layer: int, source: int) -> Weights:
        key = layer, source
        if key not in self.fits:
            block = self.plain.prefill.block(layer)
            own = block.parameters_of(*KEYS_AND_VALUES)
            pairs = zip(self._normed(layer, source), self._normed(layer, layer), strict=True)
            self.fits[key] = kv.fitted(block, own, pairs, ridge=self.ridge)
        return self.fits[key]

    def _normed(self, layer: int, source: int) -> Iterator[Tensor]:
        """What a layer's projections read of a dense stream, ``[B, N, E]``, part by part."""
        norm = self.text.model.block(layer).attention_norm
        return (norm(part.entry(source)[0]) for part in self.text.parts)


def sources(gates: Gates) -> dict[int, int]:
    """By skipped layer the layer whose entering stream it reads, where that is an earlier one."""
    written = writes(gates, "prefill")
    found = {}
    for layer, gate in enumerate(gates.prefill_attention):
        source = layer
        while source > 0 and not written[source - 1]:
            source -= 1
        if gate == "kv" and source < layer:
            found[layer] = source
    return found
