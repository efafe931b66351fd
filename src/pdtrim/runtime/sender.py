"""Prefill's side of the handover: layers are selected, encoded and sent while later ones run.

One line of work encodes and another one sends, each a thread with a short queue before it, so that
a slow link holds up prefill instead of filling the memory. On a GPU the first works on a stream of
its own, behind the event that prefill records after the layer; on a CPU the same code runs without
a stream. Coded bytes go through pinned memory over the socket; or, with a shelf, they stay on the
device in a ring that decode reads by NIXL, and the socket says what lies there.

Shapes: B requests, N tokens of the longest, G KV heads, D head width.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pdtrim.kv.frame import Entry, Layout, SentLayer, describe, encode_data, encode_part
from pdtrim.kv.policy import HandoverPolicy, select
from pdtrim.kv.wire import FrameWriter, Pool, in_words, notice, wait_for_read
from pdtrim.models.model import Model
from pdtrim.plan import PrunePlan
from pdtrim.runtime.line import Line
from pdtrim.runtime.shelf import Shelf
from pdtrim.runtime.slots import SLOTS, Slots
from pdtrim.stage.view import BlockView


class Sender:
    """The handover of one batch.

    Args:
        link: the stream to decode; nobody else writes to it meanwhile.
        requests, lengths: a request's id and the tokens that are handed over, of each.
        side: the stream that encodes, where the model is on a GPU.
        shelf: where decode reads the coded bytes; None sends them on the link.
    """

    def __init__(
        self,
        link: socket.socket,
        model: Model,
        plan: PrunePlan,
        requests: Sequence[bytes],
        lengths: Sequence[int],
        *,
        side: torch.cuda.Stream | None = None,
        shelf: Shelf | None = None,
    ) -> None:
        self._link = link
        self._policy = HandoverPolicy.of(plan)
        self._layouts = [Layout.of(plan, model.dtype, tokens) for tokens in lengths]
        self._slot = {layer: at for at, layer in enumerate(plan.sent_layers)}
        self._frame = FrameWriter(link)
        self._side = side
        self._sent: list[int] = []
        self._shelf, self._slots, self._read = shelf, Slots.of(self._layouts), 0
        self._moved = [0] * len(lengths)
        pool = None if shelf is None else shelf.fit(self._slots)
        self._sending = Line(lambda step, *item: step(*item))
        self._encoding = Line(self._encode)
        self._sending.put(self._open, requests, pool)

    def put(self, layer: int, view: BlockView) -> None:
        """Hand over a layer that prefill has just computed, or on a GPU has just launched.

        Raises:
            Exception: that of an earlier layer, which could not be selected, encoded or sent.
        """
        ready = None
        if self._side is not None:
            ready = torch.cuda.current_stream(self._side.device).record_event()
        self._encoding.put(layer, view, ready)

    def finish(self) -> list[int]:
        """Wait until all is sent; returns the bytes of each request, those that decode reads too.

        Raises:
            Exception: what :meth:`put` would have raised.
        """
        self._encoding.finish()
        self._sending.finish()
        return [sent + moved for sent, moved in zip(self._sent, self._moved, strict=True)]

    def drop(self) -> None:
        """Leave what waits; the link must have been shut down, or a full one is waited for."""
        self._encoding.drop()
        self._sending.drop()

    @torch.inference_mode()
    def _encode(self, layer: int, view: BlockView, ready: torch.cuda.Event | None) -> None:
        if self._side is None or ready is None:
            parts = self._parts(layer, view)
        else:
            with torch.cuda.stream(self._side):
                self._side.wait_event(ready)
                try:
                    parts = self._parts(layer, view)
                finally:  # the bytes are here, and prefill may have the layer's memory again
                    self._side.synchronize()
        for row, pieces in enumerate(parts):
            self._sending.put(self._send, row, pieces)

    def _parts(self, layer: int, view: BlockView) -> list[list[Tensor]]:
        """What goes over the socket of a layer of each request."""
        if self._shelf is not None:
            return self._laid(self._shelf, self._slot[layer], self._kept(layer, view))
        return [encode_part(entry, sent) for entry, sent in self._kept(layer, view)]

    def _kept(self, layer: int, view: BlockView) -> Iterator[tuple[Entry, SentLayer]]:
        """A layer of each request, selected from its own tokens alone."""
        for row, layout in enumerate(self._layouts):
            kept = select(self._policy, layer, view.row(row, layout.tokens))
            kept.check()
            sent = SentLayer(keep_GN=kept.keep_BGN[0], groups=kept.groups)
            yield layout.entries[self._slot[layer]], sent

    def _laid(
        self, shelf: Shelf, at: int, kept: Iterator[tuple[Entry, SentLayer]]
    ) -> list[list[Tensor]]:
        """Put the n-th layer where decode reads it; notices of that."""
        while self._read <= at - SLOTS:  # the layer before in this slot
            wait_for_read(self._link)
            self._read += 1
        described, sums = [], []
        for row, (entry, sent) in enumerate(kept):
            size, checksum = shelf.lay(self._slots.start(at, row), encode_data(entry, sent))
            self._moved[row] += in_words(size)
            described.append(describe(entry, sent, size))
            sums.append(checksum)
        return list(map(notice, described, torch.stack(sums).tolist()))

    def _send(self, row: int, pieces: Sequence[Tensor]) -> None:
        """A part of a request."""
        self._sent[row] += self._frame.part(pieces)

    def _open(self, requests: Sequence[bytes], pool: Pool | None) -> None:
        """The heads of the requests, and where decode reads the rest."""
        self._sent = self._frame.heads(self._layouts, requests)
        if pool is not None:
            self._sent[0] += self._frame.pool(pool)
