"""Decode's side of the handover: a loopback socket that takes frames of expected requests.

A frame is taken only for a request that the session announced, with the layout that the plan gives
for its token count. Anything else is refused with a reason, its connection is closed, and the
receiver goes on listening.
"""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass

import torch

from pdtrim.errors import WireError
from pdtrim.kv.frame import Layout, SentLayer
from pdtrim.kv.wire import read_body, read_opening, send_answer
from pdtrim.plan import PrunePlan

FRAME_TIMEOUT_S = 120.0
DRAIN_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Arrived:
    """One request's KV cache."""

    layers: dict[int, SentLayer]
    frame_bytes: int


class Receiver:
    """Listens on 127.0.0.1, on a port that the system chooses."""

    def __init__(self, plan: PrunePlan, dtype: torch.dtype) -> None:
        self.plan = plan
        self.dtype = dtype
        self.lock = threading.Lock()
        self.expected: dict[bytes, int] = {}
        self.arrived: dict[bytes, Arrived] = {}
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        threading.Thread(target=self._listen, daemon=True).start()

    def expect(self, request: bytes, tokens: int) -> None:
        """Allow one frame for a request of ``tokens`` handed-over prompt tokens."""
        with self.lock:
            self.expected[request] = tokens

    def forget(self, request: bytes) -> None:
        """Drop a request that will not be decoded."""
        with self.lock:
            self.expected.pop(request, None)
            self.arrived.pop(request, None)

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
        """Stop listening; connections that are open end with their peers."""
        self.listener.close()

    def _listen(self) -> None:
        while True:
            try:
                link, _ = self.listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(link,), daemon=True).start()

    def _serve(self, link: socket.socket) -> None:
        with link:
            link.settimeout(None)  # between frames a connection may rest
            try:
                while self._take_frame(link):
                    send_answer(link, None)
            except WireError as error:
                self._refuse(link, str(error))
            except OSError:
                return

    def _take_frame(self, link: socket.socket) -> bool:
        opening = read_opening(link)
        if opening is None:
            return False
        with self.lock:
            tokens = self.expected.get(opening.request)
        if tokens is None:
            raise WireError("no such request is expected here")
        link.settimeout(FRAME_TIMEOUT_S)
        layers, size = read_body(link, opening, Layout.of(self.plan, self.dtype, tokens))
        link.settimeout(None)
        with self.lock:
            if self.expected.pop(opening.request, None) is not None:
                self.arrived[opening.request] = Arrived(layers=layers, frame_bytes=size)
        return True

    @staticmethod
    def _refuse(link: socket.socket, reason: str) -> None:
        try:
            send_answer(link, reason)
            # read what is still under way, or closing would reset the answer away
            link.shutdown(socket.SHUT_WR)
            link.settimeout(1.0)
            until = time.monotonic() + DRAIN_S
            while time.monotonic() < until and link.recv(1 << 20):
                pass
        except OSError:
            return
