"""Orders and events between the session and a stage process: JSON lines over stdin and stdout.

Only JSON is read, never a pickle. A stage process ends when its stdin closes, so no process
outlives the session that started it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from pdtrim.errors import PdtrimError

Message = dict[str, Any]


class Control:
    """The stage process's end. Whatever libraries print goes to stderr instead."""

    def __init__(self) -> None:
        self.events: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def send(self, event: str, **fields: Any) -> None:
        """Tell the session something."""
        self.events.write(json.dumps({"event": event, **fields}) + "\n")
        self.events.flush()

    def orders(self) -> Iterator[Message]:
        """What the session asks, until it goes away."""
        for line in sys.stdin:
            yield json.loads(line)

    def serve(self, handlers: dict[str, Callable[[Message], None]]) -> None:
        """Run orders one after the other; one that fails is answered, and the process stays."""
        for order in self.orders():
            try:
                handlers[order["op"]](order)
            except (PdtrimError, OSError, ValueError, RuntimeError) as error:
                self.send("error", message=str(error).strip() or type(error).__name__)
