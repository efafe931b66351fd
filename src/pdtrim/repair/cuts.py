"""The cuts of a stage: maximal runs of removed blocks, and who reads the stream behind them."""

from __future__ import annotations

from dataclasses import dataclass

from pdtrim.plan import Gates, Stage


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Removed layers ``first`` to ``stop - 1`` of a stage.

    Attributes:
        stop: the kept layer behind; the number of layers where the run ends the model.
        readers: layers that read the stream of the cut where the dense model has another: the
            removed layers whose K and V prefill still computes, and ``stop``. The number of layers
            stands for the head. Never empty, in order.
    """

    stage: Stage
    first: int
    stop: int
    readers: tuple[int, ...]

    @property
    def keeper(self) -> int:
        """The layer before, in which a repair is folded; -1 if there is none."""
        return self.first - 1


def find_cuts(gates: Gates, stage: Stage) -> tuple[Cut, ...]:
    """Cuts of a stage, in order. Only whole blocks count as removed, not a lone attention or MLP.

    A prefill block that is skipped but computes K and V is removed as far as its stream goes. Runs
    that no reader follows are left out: prefill ends with the last layer whose KV decode reads.
    """
    cuts, first = [], 0
    for layer, on in enumerate((*writes(gates, stage), True)):
        if not on:
            continue
        if layer > first:
            behind = readers(gates.without_dead_work(), stage, first - 1)
            if behind not in ((), (first,)):  # the first itself reads what it always did
                cuts.append(Cut(stage=stage, first=first, stop=layer, readers=behind))
        first = layer + 1
    return tuple(cuts)


def merged_layers(gates: Gates) -> dict[tuple[Stage, int], tuple[int, ...]]:
    """For each block before a cut, itself and the removed layers: what a plan records of it."""
    stages: tuple[Stage, ...] = ("prefill", "decode")
    return {
        (stage, cut.keeper): tuple(range(cut.keeper, cut.stop))
        for stage in stages
        for cut in find_cuts(gates, stage)
        if cut.first > 0
    }


def writes(gates: Gates, stage: Stage) -> tuple[bool, ...]:
    """Whether each layer adds anything to a stage's stream."""
    return tuple(a in ("full", True) or m for a, m in zip(*gates.of(stage), strict=True))


def readers(gates: Gates, stage: Stage, layer: int) -> tuple[int, ...]:
    """Who reads the stream that a layer leaves: removed blocks that make K and V, a kept one.

    The number of layers stands for the head. Empty in prefill behind the last layer that is read.

    Args:
        gates: without dead work.
        layer: -1 for the stream that enters the model.
    """
    found: list[int] = []
    for i in range(layer + 1, gates.num_layers):
        if writes(gates, stage)[i]:
            return (*found, i)
        if gates.of(stage)[0][i] == "kv":
            found.append(i)
    return (*found, gates.num_layers) if stage == "decode" else tuple(found)
