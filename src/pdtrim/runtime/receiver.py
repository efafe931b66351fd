"""Decode's side of the handover: takes frames of expected requests from a stream.

A frame is taken only for requests that the session announced, with the layout that the plan gives
for their token counts, and only if its hashes fit. One thread reads and compares hashes; another
decodes what came while later layers are under way. Anything else is refused with a reason, and its
stream is closed; the session then gives both stages a new one. There is no port or path at which
anybody else could speak to decode.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from dataclasses import dataclass, field

import torch

from pdtrim.errors import WireError
from pdtrim.kv.frame import HEAD, Layout, Opening, SentLayer, check_opening
from pdtrim.kv.wire import PART_TIMEOUT_S, FrameReader, RawPart, send_answer
from pdtrim.plan import PrunePlan
from pdtrim.runtime.control import words_of
from pdtrim.runtime.line import Line

DRAIN_S = 5.0


@dataclass(kw_only=True)
class Arrived:
    """One request's KV cache, and the bytes that crossed the socket for it."""

    layers: dict[int, SentLayer] = field(default_factory=dict)
    frame_bytes: int = HEAD.size


class Receiver:
    """Reads one stream at a time, in a thread."""

    def __init__(self, plan: PrunePlan, dtype: torch.dtype) -> None:
        self.plan = plan
        self.dtype = dtype
        self.lock = threading.Lock()
        self.expected: dict[bytes, int] = {}
        self.arrived: dict[bytes, Arrived] = {}
        self.stream: socket.socket | None = None

    def attach(self, stream: socket.socket) -> None:
        """Take frames from this stream, and no longer from the one before."""
        self.close()
        self.stream = stream
        threading.Thread(target=self._serve, args=(stream,), daemon=True).start()

    def expect(self, request: bytes, tokens: int) -> None:
        """Allow one frame for a request of ``tokens`` handed-over prompt tokens."""
        with self.lock:
            self.expected[request] = tokens

    def clear(self) -> None:
        """Drop all requests, whether they have come or not."""
        with self.lock:
            self.expected.clear()
            self.arrived.clear()

    def take(self, request: bytes) -> Arrived:
        """The request's cache, which prefill has confirmed to be here.

        Raises:
            WireError: no frame came for it.
        """
        with self.lock:
            arrived = self.arrived.pop(request, None)
        if arrived is None:
            raise WireError("no KV cache has arrived for this request")
        return arrived

    def close(self) -> None:
        """Take no more frames. The thread that reads closes the stream."""
        if self.stream is not None:
            with contextlib.suppress(OSError):  # it is closed already
                self.stream.shutdown(socket.SHUT_RDWR)
            self.stream = None

    def _serve(self, stream: socket.socket) -> None:
        with stream:
            stream.settimeout(None)  # between frames it may rest
            try:
                while self._take_frame(stream):
                    send_answer(stream, None)
            except OSError:
                return
            except Exception as error:  # a codec may fail in any way at bytes that lie
                self._refuse(stream, words_of(error))

    def _take_frame(self, stream: socket.socket) -> bool:
        frame = FrameReader(stream)
        opening = frame.opening()
        if opening is None:
            return False
        stream.settimeout(PART_TIMEOUT_S)
        layouts = self._layouts(frame, opening)
        batch = {request: Arrived() for request in layouts}

        def decode(request: bytes, part: RawPart) -> None:
            batch[request].layers[part.entry.layer] = part.decode()
            batch[request].frame_bytes += part.count

        decoding = Line(decode)
        try:
            for slot in range(len(self.plan.sent_layers)):
                for request, layout in layouts.items():
                    decoding.put(request, frame.part(layout.entries[slot], layout))
        finally:  # what an earlier layer fails at comes before what is wrong with a later one
            decoding.finish()
        stream.settimeout(None)
        with self.lock:
            for request, arrived in batch.items():
                if self.expected.pop(request, None) is not None:
                    self.arrived[request] = arrived
        return True

    def _layouts(self, frame: FrameReader, opening: Opening) -> dict[bytes, Layout]:
        """What the requests of a frame must look like, by their heads, which are read."""
        layouts: dict[bytes, Layout] = {}
        while True:
            with self.lock:
                tokens = self.expected.get(opening.request)
            if tokens is None or opening.request in layouts:
                raise WireError("no such request is expected here")
            layouts[opening.request] = Layout.of(self.plan, self.dtype, tokens)
            check_opening(opening, layouts[opening.request])
            if not opening.more:
                return layouts
            following, more = frame.opening(), opening.more - 1
            if following is None or following.more != more:
                raise WireError(f"a frame whose heads do not count down: {more} should follow")
            opening = following

    @staticmethod
    def _refuse(stream: socket.socket, reason: str) -> None:
        try:
            send_answer(stream, reason)
            # read what is still under way, or closing would reset the answer away
            stream.shutdown(socket.SHUT_WR)
            stream.settimeout(1.0)
            until = time.monotonic() + DRAIN_S
            while time.monotonic() < until and stream.recv(1 << 20):
                pass
        except OSError:
            return
