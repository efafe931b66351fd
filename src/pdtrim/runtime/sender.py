"""Prefill's side of the handover: layers are selected, encoded and sent while later ones run.

One line of work encodes and another one sends, each a thread with a short queue before it, so that
a slow link holds up prefill instead of filling the memory. On a GPU the first works on a stream of
its own, behind the event that prefill records after the layer, and copies into pinned memory; on a
CPU the same code runs without a stream.

Shapes: B requests, N tokens of the longest, G KV heads, D head width.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

import torch
from torch import Tensor

from pdtrim.kv.frame import Layout, SentLayer, encode_part
from pdtrim.kv.policy import HandoverPolicy, select
from pdtrim.kv.wire import FrameWriter
from pdtrim.models.model import Model
from pdtrim.plan import PrunePlan
from pdtrim.runtime.line import Line
from pdtrim.stage.view import BlockView


class Sender:
    """The handover of one batch.

    Args:
        link: the stream to decode; nobody else writes to it meanwhile.
        requests, lengths: a request's id and the tokens that are handed over, of each.
    """

    def __init__(
        self,
        link: socket.socket,
        model: Model,
        plan: PrunePlan,
        requests: Sequence[bytes],
        lengths: Sequence[int],
    ) -> None:
        self._policy = HandoverPolicy.of(plan)
        self._layouts = [Layout.of(plan, model.dtype, tokens) for tokens in lengths]
        self._slot = {layer: at for at, layer in enumerate(plan.sent_layers)}
        self._frame = FrameWriter(link)
        self._side = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None
        self._sent: list[int] = []
        self._sending = Line(self._send)
        self._encoding = Line(self._encode)
        self._sending.put(requests)

    def put(self, layer: int, view: BlockView) -> None:
        """Hand over a layer that prefill has just computed, or on a GPU has just launched.

        Raises:
            Exception: that of an earlier layer, which could not be selected, encoded or sent.
        """
        ready = None if self._side is None else torch.cuda.current_stream().record_event()
        self._encoding.put(layer, view, ready)

    def finish(self) -> list[int]:
        """Wait until all is sent; returns the bytes of each request on the wire.

        Raises:
            Exception: what :meth:`put` would have raised.
        """
        self._encoding.finish()
        self._sending.finish()
        return self._sent

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
            self._sending.put(row, pieces)

    def _parts(self, layer: int, view: BlockView) -> list[list[Tensor]]:
        """A layer of each request, encoded from its own tokens alone."""
        parts = []
        for row, layout in enumerate(self._layouts):
            kept = select(self._policy, layer, view.row(row, layout.tokens))
            kept.check()
            sent = SentLayer(keep_GN=kept.keep_BGN[0], groups=kept.groups)
            parts.append(encode_part(layout.entries[self._slot[layer]], sent))
        return parts

    def _send(self, first: Sequence[bytes] | int, pieces: Sequence[Tensor] = ()) -> None:
        """The heads of the requests, or the part of one of them."""
        if isinstance(first, int):
            self._sent[first] += self._frame.part(pieces)
        else:
            self._sent = self._frame.heads(self._layouts, first)
