"""Prefill of a shape, with each layer's cache encoded, moved and decoded beside it.

Prefill, encoding, the link and decoding are lanes. Each is fed by a thread of its own, as two
machines would be, so that a code whose length must be waited for holds up nothing but itself.

Shapes: L layers, G KV heads, N prompt tokens, D head width, E hidden width; 2 for K and V.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor

from pdtrim.bench.lanes import Lane, Mark, seconds
from pdtrim.bench.traffic import LayerSent, Sizes
from pdtrim.clock import finish
from pdtrim.kv.kernels import together
from pdtrim.models.model import Model
from pdtrim.plan import Gates
from pdtrim.stage.step import prefill_block

T = TypeVar("T")


class Machines:
    """What sends and what receives.

    Args:
        model: of one block, which stands for each block of the shape.
        kv_2LGND: the cache that is handed over, on the sending device.
        target: the receiving device.
    """

    def __init__(self, model: Model, kv_2LGND: Tensor, sizes: Sizes, target: torch.device) -> None:
        self.model, self.kv_2LGND, self.sizes, self.target = model, kv_2LGND, sizes, target
        self.source = kv_2LGND.device
        at_1N = torch.arange(sizes.tokens, device=self.source)[None]
        self.rope = model.rope(at_1N)
        hidden = int(model.config.hidden_size)
        drawn = torch.Generator().manual_seed(0)
        x_1NE = torch.randn(1, sizes.tokens, hidden, generator=drawn)
        self.x_1NE = x_1NE.to(self.source, model.dtype)
        # prefill ends with the last layer's keys and values, as a stage's does
        self.gates = Gates.dense(sizes.layers).without_dead_work()

    def prefill(self, layer: int, x_1NE: Tensor) -> Tensor:
        """One layer of the prompt."""
        x_1NE, _ = prefill_block(
            self.model.block(0),
            x_1NE,
            self.rope,
            self.model.rope,
            attention=self.gates.prefill_attention[layer],
            mlp=self.gates.prefill_mlp[layer],
        )
        return x_1NE


@dataclass(frozen=True, kw_only=True)
class Alone:
    """Seconds of each layer with nothing beside it, and the bytes that it sends."""

    encode_L: list[float]
    move_L: list[float]
    decode_L: list[float]
    bytes_L: list[int]


@dataclass(frozen=True, kw_only=True)
class PrefillRun:
    """One prefill.

    Attributes:
        encoded_s: when each layer was encoded, counted from prefill's end: mostly below 0.
        exposed_s: from prefill's end until the last layer was decoded, or moved if nothing decodes.
    """

    prefill_s: float
    encoded_s: list[float]
    exposed_s: float


class Pipeline:
    """Runs prefill with a handover beside it, and the parts of a handover alone."""

    def __init__(self, machines: Machines) -> None:
        self.machines = machines
        source, target = machines.source, machines.target
        self.prefilling = Lane(source)
        # a small kernel would else wait until a large one of prefill has left the device
        self.encoding = Lane(source, first=True)
        self.link = Lane(source, first=True)
        self.decoding = Lane(target, first=True)

    def alone(self, layers: Sequence[LayerSent]) -> tuple[Alone, list[Tensor]]:
        """Encode all layers, then move all, then decode all; times, and what was encoded."""
        self._finish()
        datas, encode_L = self._each(self.encoding, self._encode, list(enumerate(layers)))
        theres, move_L = self._each(self.link, self._move, [(data,) for data in datas])
        pairs = list(zip(layers, theres, strict=True))
        with together():
            _, decode_L = self._each(self.decoding, self._decode, pairs)
        sizes = [data.numel() for data in datas]
        times = Alone(encode_L=encode_L, move_L=move_L, decode_L=decode_L, bytes_L=sizes)
        return times, datas

    def run(self, layers: Sequence[LayerSent] | None, *, decode: bool = False) -> PrefillRun:
        """One prefill.

        Args:
            layers: how each travels; None hands nothing over.
            decode: whether the receiver decodes; on one device it takes time from prefill there,
                which two machines do not.
        """
        self._finish()
        made: SimpleQueue[tuple[int, Mark] | None] = SimpleQueue()
        moved: SimpleQueue[tuple[LayerSent, Tensor, Mark] | None] = SimpleQueue()
        with ThreadPoolExecutor(2) as pool:
            sending = pool.submit(self._send, layers or (), made, moved)
            taking = pool.submit(self._take, moved, decode)
            try:
                start, stop = self._prefill(made)
            finally:
                made.put(None)  # nobody waits for a layer that a failure left out
            encoded, _held = sending.result()
            last, _decoded = taking.result()
        end = stop if last is None else self.prefilling.reached(last)
        self._finish()
        return PrefillRun(
            prefill_s=seconds(start, stop),
            encoded_s=[_from(stop, mark) for mark in encoded],
            exposed_s=_from(stop, end),
        )

    def _prefill(self, made: SimpleQueue[tuple[int, Mark] | None]) -> tuple[Mark, Mark]:
        """Run all layers, and tell when each is made; the marks before and behind them."""
        with self.prefilling.work():
            start = stop = self.prefilling.mark()
            x_1NE = self.machines.x_1NE
            for layer in range(self.machines.sizes.layers):
                x_1NE = self.machines.prefill(layer, x_1NE)
                stop = self.prefilling.mark()
                made.put((layer, stop))
        return start, stop

    @torch.inference_mode()
    def _send(
        self,
        layers: Sequence[LayerSent],
        made: SimpleQueue[tuple[int, Mark] | None],
        moved: SimpleQueue[tuple[LayerSent, Tensor, Mark] | None],
    ) -> tuple[list[Mark], list[Tensor]]:
        """Encode and move layers as prefill makes them; the tensors live until all is done."""
        marks, held = [], []
        try:
            while layers and (came := made.get()) is not None:
                layer, ready = came
                with self.encoding.work():
                    self.encoding.wait(ready)
                    data = self._encode(layer, layers[layer])
                    marks.append(self.encoding.mark())
                with self.link.work():
                    self.link.wait(marks[-1])
                    there = self._move(data)
                    moved.put((layers[layer], there, self.link.mark()))
                held += [data, there]
        finally:
            moved.put(None)
        return marks, held

    @torch.inference_mode()
    def _take(
        self, moved: SimpleQueue[tuple[LayerSent, Tensor, Mark] | None], decode: bool
    ) -> tuple[Mark | None, list[tuple[Tensor, Tensor]]]:
        """Decode layers as they arrive; the mark behind the last one."""
        last, held = None, list[tuple[Tensor, Tensor]]()
        with self.decoding.work():
            with together():
                while (came := moved.get()) is not None:
                    sent, there, last = came
                    if decode:
                        self.decoding.wait(last)
                        held.append(self._decode(sent, there))
            if held:
                last = self.decoding.mark()
        return last, held

    def _each(
        self, lane: Lane, run: Callable[..., T], arguments: Iterable[tuple[Any, ...]]
    ) -> tuple[list[T], list[float]]:
        """What a lane makes of each layer, and the seconds that each took."""
        results: list[T] = []
        marks: list[Mark] = []
        with lane.work():
            marks.append(lane.mark())
            for some in arguments:
                results.append(run(*some))
                marks.append(lane.mark())
        self._finish()
        return results, [seconds(*pair) for pair in pairwise(marks)]

    def _encode(self, layer: int, sent: LayerSent) -> Tensor:
        k_LGND, v_LGND = self.machines.kv_2LGND
        return sent.encode(k_LGND[layer], v_LGND[layer])

    def _move(self, data: Tensor) -> Tensor:
        there = torch.empty_like(data, device=self.machines.target)
        return there.copy_(data, non_blocking=True)

    def _decode(self, sent: LayerSent, data: Tensor) -> tuple[Tensor, Tensor]:
        return sent.decode(data, self.machines.sizes, self.machines.kv_2LGND.dtype)

    def _finish(self) -> None:
        finish(self.machines.source, self.machines.target)


def _from(stop: Mark, mark: Mark) -> float:
    """Seconds from prefill's end to a mark, which may be before it."""
    if isinstance(stop, float):
        return float(mark - stop)
    return -seconds(mark, stop)
