"""How every child process is started: without the current folder, and not longer than its parent.

``python -m`` puts the current folder before all others, so that a ``torch.py`` which lies there by
chance, or was put there, runs instead of torch. ``-P`` exists from Python 3.11 on and ``-I`` drops
PYTHONPATH too; what stands here does the same on every version and keeps PYTHONPATH.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

RUN = (
    "import sys; sys.path[0] or sys.path.pop(0); sys.path.append(sys.argv.pop(1));"
    " name = sys.argv.pop(1); import runpy;"
    " runpy.run_module(name, run_name='__main__', alter_sys=True)"
)
HOME = str(Path(__file__).parents[2])  # last on the child's path, or a checkout would not be found
PR_SET_PDEATHSIG = 1


def python_module(module: str, *args: str) -> tuple[str, ...]:
    """The command that runs a module of this Python, whatever the current folder holds."""
    return (sys.executable, "-c", RUN, HOME, module, *args)


def child_env(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment for a child.

    From Python 3.11 on what the child starts, with ``-m`` or by ``multiprocessing``, leaves the
    current folder out too; 3.10 has no such setting.
    """
    return {**os.environ, "PYTHONSAFEPATH": "1", **(extra or {})}


def die_with(parent: int) -> None:
    """End this process, busy or stopped, in the moment in which the thread that started it ends.

    The kernel does that on Linux. Elsewhere a process must watch its stdin.

    Args:
        parent: number of the process that should still be the parent.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it ended before the kernel was told
        os._exit(1)
