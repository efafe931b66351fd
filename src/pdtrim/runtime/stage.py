"""What a stage process runs: ``pdtrim.runtime.stage STAGE DIR PARENT CHANNEL DEVICE``.

It is tied to its parent and says that it lives before it imports torch and loads the model, which
takes a while.
"""

from __future__ import annotations

import os
import socket
import sys
from importlib import import_module

from pdtrim.runtime.control import Control
from pdtrim.runtime.start import die_with


def main() -> None:
    """Load the stage's checkpoint, say so, and serve until the session goes away."""
    stage, folder, parent, channel, device = sys.argv[1:]
    die_with(int(parent))
    control = Control(socket.socket(fileno=int(channel)))
    try:
        process = import_module(f"pdtrim.runtime.{stage}").load(control, folder, device)
    except Exception as error:
        control.fail(error)
        os._exit(1)  # at once: a thread waits on stdin
    control.send("ready", digest=process.plan.digest)
    control.serve(process.handlers)


if __name__ == "__main__":
    main()
