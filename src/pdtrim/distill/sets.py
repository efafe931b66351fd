"""The paper's two sets: which removed blocks a neighbour has to make up for.

PDTrim (arXiv 2509.04467) assigns every candidate block to a *pruning set*, from which blocks are
removed as they are, or to a *distillation set*, whose blocks are merged with a neighbour: two
become one, lightly distilled. Its distillation threshold is 0.95. How the threshold decides is not
known from the abstract and the reviews, so the rule is an object with two readings:

* ``pairs``: a block belongs to the distillation set if with one of its neighbours it forms a pair
  whose input and output are similar, cosine at least the threshold: such a pair does little that a
  single block could not learn.
* ``redundancy``: a block whose own input and output are that similar is pruned outright; any other
  must be made up for if it is removed.
* ``none``: nothing is distilled; the ablation.

Shapes: L layers.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from pdtrim.finite import finite
from pdtrim.plan import Stage
from pdtrim.records import Frozen
from pdtrim.stage.forward import Trace
from pdtrim.words import Reading

Neighbours = tuple[int, int]
"""Two neighbouring layers, the first one first."""


class SetRule(Frozen):
    """Which blocks belong to the distillation set, and with which neighbour each."""

    reading: Reading = "pairs"
    threshold: float = Field(default=0.95, ge=-1, le=1)

    def distilled(self, block_L: Tensor, pair_L: Tensor) -> dict[int, tuple[int, ...]]:
        """The distillation set: a block's possible partners, the more similar pair first.

        Args:
            block_L: cosine similarity of each block's input and output.
            pair_L: of the input of block i and the output of block i + 1; the last entry is unused.
        """
        if self.reading == "none":
            return {}
        last = len(block_L) - 1
        found = {}
        for layer in range(last + 1):
            likeness = {}
            if layer > 0:
                likeness[layer - 1] = float(pair_L[layer - 1])
            if layer < last:
                likeness[layer + 1] = float(pair_L[layer])
            if self.reading == "pairs":
                likeness = {i: s for i, s in likeness.items() if s >= self.threshold}
            elif float(block_L[layer]) >= self.threshold:
                likeness = {}
            if likeness:
                found[layer] = tuple(sorted(likeness, key=lambda i: -likeness[i]))
        return found


def similarity(traces: list[Trace], stage: Stage, *, span: int = 1) -> Tensor:
    """Cosine similarity of the input of block i and the output of block i + span - 1, ``[L]``.

    Mean over the stage's tokens; entries whose span passes the last block are 0. The last block's
    output is the stream before the final norm, as ShortGPT (2403.03853) defines.
    """
    side = 0 if stage == "prefill" else 1
    columns = []
    for trace in traces:
        flows = [entry[side].float() for entry in trace]
        ahead = [
            F.cosine_similarity(before, after, dim=-1).mean()
            for before, after in zip(flows, flows[span:], strict=False)
        ]
        columns.append(torch.stack(ahead + [torch.zeros_like(ahead[0])] * (span - 1)))
    return finite(torch.stack(columns).mean(0), "the similarity of a block's input and output")


def merges(removed: Iterable[int], distilled: dict[int, tuple[int, ...]]) -> tuple[Neighbours, ...]:
    """Pairs that become one block: a removed block and a kept neighbour; no block is in two pairs.

    A removed block of the distillation set whose partners are all removed or taken has none.
    """
    gone = set(removed)
    taken: set[int] = set()
    pairs = []
    for layer in sorted(gone):
        partner = next((i for i in distilled.get(layer, ()) if i not in gone | taken), None)
        if partner is not None:
            taken.add(partner)
            pairs.append((min(layer, partner), max(layer, partner)))
    return tuple(pairs)
