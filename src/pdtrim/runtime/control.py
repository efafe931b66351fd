"""Orders and events between the session and a stage process: JSON lines over stdin and stdout.

Only JSON is read, never a pickle. Every order has a number and every event names the order that it
answers (0 before the first), so that what an abandoned order still says is nobody's answer. A later
order abandons all before it. While a stage process lives it says so twice a second.

A stage process ends with its session, whatever it does at that moment: the kernel kills it when the
session's process is gone (``start.die_with``), and a thread ends it when its stdin closes.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, TextIO

from pdtrim.errors import PdtrimError

Message = dict[str, Any]
Handlers = dict[str, Callable[[Message], None]]

BEAT_S = 0.5
ALIVE = "alive"
MAX_WORDS = 1000


class Abandoned(Exception):
    """The session has given another order: nobody waits for this one."""


class Control:
    """The stage process's end. Whatever libraries print goes to stderr instead.

    Args:
        channel: where the session hands over its sockets.
    """

    def __init__(self, channel: socket.socket) -> None:
        self.events: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._channel = channel
        self._lock = threading.Lock()
        self._orders: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._order = self._latest = 0
        for task in (self._read, self._beat):
            threading.Thread(target=task, daemon=True).start()

    def send(self, event: str, **fields: Any) -> None:
        """Tell the session something about the order at hand."""
        line = json.dumps({"event": event, "id": self._order, **fields}) + "\n"
        with self._lock:
            self.events.write(line)
            self.events.flush()

    def check(self) -> None:
        """Raise Abandoned if the order at hand is: to be called in long loops."""
        if self._order < self._latest:
            raise Abandoned

    def take_socket(self) -> socket.socket:
        """The socket that came with an order."""
        _, (descriptor,), _, _ = socket.recv_fds(self._channel, 1, 1)
        return socket.socket(fileno=descriptor)

    def serve(self, handlers: Handlers) -> None:
        """Run orders one after the other; one that fails is answered, and the process stays."""
        while True:
            order = self._orders.get()
            self._order = order["id"]
            try:
                handlers[order["op"]](order)
            except Abandoned:
                self.send("abandoned")
            except Exception as error:  # of any kind: the next order may well succeed
                self.fail(error)

    def fail(self, error: Exception) -> None:
        """Answer with an error; one that is not a user's leaves its trace in the log."""
        if not isinstance(error, PdtrimError):
            traceback.print_exception(error)
        self.send("error", message=words_of(error))

    def _read(self) -> None:
        for line in sys.stdin:
            order = json.loads(line)
            self._latest = order["id"]
            self._orders.put(order)
        os._exit(0)  # the session is gone

    def _beat(self) -> None:
        try:
            while True:
                self.send(ALIVE)
                time.sleep(BEAT_S)
        except OSError:
            os._exit(0)


def words_of(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())[:MAX_WORDS]
    if isinstance(error, PdtrimError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
