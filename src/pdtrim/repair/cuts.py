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
    attention, mlp = gates.of(stage)
    kept = [a in ("full", True) or m for a, m in zip(attention, mlp, strict=True)]
    cuts, first = [], 0
    for layer, on in enumerate((*kept, True)):
        if not on:
            continue
        if layer > first:
            readers = _readers(gates, stage, first, layer)
            if readers:
                cuts.append(Cut(stage=stage, first=first, stop=layer, readers=readers))
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


def _readers(gates: Gates, stage: Stage, first: int, stop: int) -> tuple[int, ...]:
    if stage == "decode":
        return (stop,)
    inside = tuple(i for i in range(first, stop) if gates.decode_attention[i])
    readers = (*inside, stop) if stop <= gates.last_read else inside
    return () if readers == (first,) else readers  # there, nothing is missing yet
