"""Decode's side of the handover: takes frames of expected requests from a stream.

A frame is taken only for requests that the session announced, with the layout that the plan gives
for their token counts, and only if its hashes and checksums fit. One thread reads, over the socket
or out of prefill's memory; another decodes what came while later layers are under way, on a GPU on
a stream of its own. Anything else is refused with a reason, and its
stream is closed; the session then gives both stages a new one. There is no port or path at which
anybody else could speak to decode.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from pdtrim.devices import side_stream
from pdtrim.errors import WireError
from pdtrim.kv.checksum import checksum
from pdtrim.kv.frame import HEAD, Layout, Opening, SentLayer, check_opening
from pdtrim.kv.kernels import together
from pdtrim.kv.wire import PART_TIMEOUT_S, FrameReader, RawPart, send_answer, send_read
from pdtrim.plan import PrunePlan
from pdtrim.runtime.config import Way
from pdtrim.runtime.control import words_of
from pdtrim.runtime.fetcher import Fetcher
from pdtrim.runtime.line import Line
from pdtrim.runtime.slots import Slots

DRAIN_S = 5.0
CPU = torch.device("cpu")


@dataclass(kw_only=True)
class Arrived:
    """One request's KV cache, and the bytes that crossed for it."""

    layers: dict[int, SentLayer] = field(default_factory=dict)
    frame_bytes: int = HEAD.size


class Receiver:
    """Reads one stream at a time, in a thread."""

    def __init__(self, plan: PrunePlan, dtype: torch.dtype, device: torch.device = CPU) -> None:
        self.plan = plan
        self.dtype = dtype
        self.device = device
        self.lock = threading.Lock()
        self.expected: dict[bytes, int] = {}
        self.arrived: dict[bytes, Arrived] = {}
        self.stream: socket.socket | None = None
        self._fetcher: Fetcher | None = None
        self._side = side_stream(device)

    def attach(self, stream: socket.socket, way: Way = "socket") -> None:
        """Take frames from this stream, and no longer from the one before.

        Raises:
            PdtrimError: NIXL is asked for, and is not installed or does not start.
        """
        self.close()
        if way == "nixl" and self._fetcher is None:
            self._fetcher = Fetcher(self.device)
        fetcher = self._fetcher if way == "nixl" else None
        self.stream = stream
        threading.Thread(target=self._serve, args=(stream, fetcher), daemon=True).start()

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

    def _serve(self, stream: socket.socket, fetcher: Fetcher | None) -> None:
        with stream:
            stream.settimeout(None)  # between frames it may rest
            try:
                while self._take_frame(stream, fetcher):
                    send_answer(stream, None)
            except OSError:
                return
            except Exception as error:  # a codec may fail in any way at bytes that lie
                self._refuse(stream, words_of(error))

    def _take_frame(self, stream: socket.socket, fetcher: Fetcher | None) -> bool:
        frame = FrameReader(stream)
        opening = frame.opening()
        if opening is None:
            return False
        stream.settimeout(PART_TIMEOUT_S)
        layouts = self._layouts(frame, opening)
        batch = {request: Arrived() for request in layouts}
        with contextlib.nullcontext() if fetcher is None else fetcher.lock:
            if fetcher is None:
                parts = self._by_socket(frame, layouts)
            else:
                pool, said = frame.pool()
                next(iter(batch.values())).frame_bytes += said
                fetcher.open(pool, Slots.of(list(layouts.values())))
                parts = self._by_fetcher(frame, layouts, stream, fetcher)
            decoding = Line(self._decode)
            try:
                for some in parts:
                    decoding.put(batch, some)
            finally:  # what an earlier layer fails at comes before what is wrong with a later one
                decoding.finish()
        stream.settimeout(None)
        with self.lock:
            for request, arrived in batch.items():
                if self.expected.pop(request, None) is not None:
                    self.arrived[request] = arrived
        return True

    def _by_socket(
        self, frame: FrameReader, layouts: Mapping[bytes, Layout]
    ) -> Iterator[dict[bytes, RawPart]]:
        """Part after part, with its data on the CPU."""
        for at in range(len(self.plan.sent_layers)):
            for request, layout in layouts.items():
                yield {request: frame.part(layout.entries[at], layout)}

    def _by_fetcher(
        self,
        frame: FrameReader,
        layouts: Mapping[bytes, Layout],
        stream: socket.socket,
        fetcher: Fetcher,
    ) -> Iterator[dict[bytes, RawPart]]:
        """Layer after layer, with its data in this stage's memory, not yet compared."""
        for at in range(len(self.plan.sent_layers)):
            parts = {
                request: frame.notice(layout.entries[at], layout)
                for request, layout in layouts.items()
            }
            places = fetcher.fetch(at, [part.data_bytes for part in parts.values()])
            send_read(stream)
            yield {
                request: replace(part, data=data)
                for (request, part), data in zip(parts.items(), places, strict=True)
            }

    def _decode(self, batch: Mapping[bytes, Arrived], parts: Mapping[bytes, RawPart]) -> None:
        """Compare checksums and decode, where the models are; all is done when this returns."""
        with torch.cuda.stream(self._side):
            with together():
                check_sums([part for part in parts.values() if part.checksum is not None])
                for request, part in parts.items():
                    assert part.data is not None
                    data = part.data[: part.data_bytes].to(self.device)
                    batch[request].layers[part.entry.layer] = replace(part, data=data).decode()
                    batch[request].frame_bytes += part.count
            if self._side is not None:
                self._side.synchronize()

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


def check_sums(parts: Sequence[RawPart]) -> None:
    """Compare what was read out of prefill's memory with what prefill said lies there.

    Raises:
        WireError: it differs.
    """
    if not parts:
        return
    found = torch.stack([checksum(part.data) for part in parts if part.data is not None]).tolist()
    for part, value in zip(parts, found, strict=True):
        if value % 2**64 != part.checksum:
            raise WireError(
                f"layer {part.entry.layer}: its checksum does not fit the bytes that were read:"
                " they changed on the way, or were overwritten"
            )
