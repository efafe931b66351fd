"""Runs one command in its process group, and ends the group when the process that asked is gone.

``python_module("pdtrim.runtime.keeper", *command)``, as the leader of a group, with a pipe as stdin
that the asking process holds open and never writes to. However that process ends, the kernel closes
the pipe; then all of the group is killed, with whatever the command has started. Else the keeper
ends as its command does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from types import FrameType

CANNOT_START = 127  # a shell's number


def _end_with_stdin() -> None:
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


def _heed(number: int, frame: FrameType | None) -> None:
    """The group got the signal: the command decides what it means."""


def main() -> None:
    """Run the command of the arguments."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # an ignored one stays so
            signal.signal(number, _heed)
    try:
        child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    except OSError as error:
        print(f"cannot start {sys.argv[1]}: {error.strerror}", flush=True)
        os._exit(CANNOT_START)
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    code = child.wait()
    if code < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no handler to reset
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
