"""Keeps processes running together: all start, all answer, and when one ends all end.

Each process has a session and group of its own. A Ctrl-C reaches the supervisor alone, which ends
the groups in order; whatever a process leaves behind is in its group and ends with it. The group's
leader is a keeper (``runtime/keeper.py``), which ends the group when the supervisor is killed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPException
from types import FrameType

from pdtrim.engines.base import Process
from pdtrim.errors import RuntimeFailure
from pdtrim.runtime.start import child_env, python_module

GRACE_SECONDS = 10.0
POLL_SECONDS = 0.2
COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # the router colours its lines whoever reads them
Log = Callable[[str, str], None]


class _Stopped(Exception):
    """Someone wants an end."""


def serve(
    processes: Sequence[Process],
    *,
    start_seconds: float,
    say: Callable[[str], None],
    stop: threading.Event | None = None,
    log: Log,
) -> None:
    """Run servers, then the router, until SIGINT, SIGTERM, SIGHUP or ``stop``.

    However it ends, nothing of what was started is left.

    Args:
        processes: as an engine gives them, the router last.
        start_seconds: until all servers, and then the router, have to answer.
        say: told the endpoint once it answers.
        log: told every line of output with the name of its process, from several threads.

    Raises:
        RuntimeFailure: a process did not start, did not answer in time, or ended by itself.
    """
    stop = stop or threading.Event()
    *servers, router = processes
    children: list[_Child] = []
    with _signals() as came:

        def pause() -> None:
            if stop.wait(POLL_SECONDS) or came:
                raise _Stopped

        try:
            for group in (servers, [router]):
                for process in group:
                    children.append(_Child(process, log))
                _wait_until_healthy(children, start_seconds, pause)
            say(f"OpenAI endpoint: {router.url}/v1")
            while True:
                pause()
                _check(children)
        except _Stopped:
            pass
        finally:
            _end(children)


class _Child:
    """A process that was started, and the last thing that it said."""

    def __init__(self, process: Process, log: Log) -> None:
        self.process = process
        self.last = "no output"
        if shutil.which(process.command[0]) is None:
            raise RuntimeFailure(
                f"cannot start {process.name}: there is no program {process.command[0]}"
            )
        try:
            self.popen = subprocess.Popen(
                python_module("pdtrim.runtime.keeper", *process.command),
                env=child_env(process.env),
                stdin=subprocess.PIPE,  # nothing is written: it is open as long as we live
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                text=True,
                encoding="utf-8",
                errors="replace",
            )
        except OSError as error:
            raise RuntimeFailure(f"cannot start {process.name}: {error}") from error
        self.reader = threading.Thread(target=self._read, args=(log,), daemon=True)
        self.reader.start()

    def _read(self, log: Log) -> None:
        assert self.popen.stdout is not None
        with self.popen.stdout as lines:
            for line in lines:
                if text := COLOUR.sub("", line).rstrip():
                    self.last = text
                    log(self.process.name, text)

    def exited(self) -> bool:
        """Whether it ended. It is not reaped: its number, the group's too, must stay its own."""
        if self.popen.returncode is not None:
            return True
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.popen.pid, flags) is not None

    def terminate(self) -> None:
        """Ask the group to end."""
        if self.popen.returncode is None:
            os.killpg(self.popen.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End the group, even if its leader is dead: a server can leave spinning workers."""
        if self.popen.returncode is None:
            os.killpg(self.popen.pid, signal.SIGKILL)
            self.popen.wait()
        assert self.popen.stdin is not None
        self.popen.stdin.close()
        self.reader.join(timeout=5)  # its last line; forever if someone left the group

    def failure(self) -> RuntimeFailure:
        """Why it ended, as far as it said."""
        self.kill()
        return RuntimeFailure(
            f"{self.process.name} ended (exit {self.popen.returncode}): {self.last}"
        )


def _check(children: Sequence[_Child]) -> None:
    """Raise if one has ended."""
    for child in children:
        if child.exited():
            raise child.failure()


def _wait_until_healthy(
    children: Sequence[_Child], seconds: float, pause: Callable[[], None]
) -> None:
    deadline = time.monotonic() + seconds
    waiting = list(children)
    while True:
        _check(children)
        waiting = [child for child in waiting if not _is_healthy(child.process)]
        if not waiting:
            return
        if time.monotonic() > deadline:
            child = waiting[0]
            raise RuntimeFailure(
                f"{child.process.name} did not answer within {seconds:g} s, its last line:"
                f" {child.last}"
            )
        pause()


def _is_healthy(process: Process) -> bool:
    # loopback is not to be asked of a proxy that the environment names
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(process.url + process.health, timeout=2):
            return True  # an error status raises
    except (OSError, HTTPException):
        return False


def _end(children: Sequence[_Child]) -> None:
    """Ask all groups to end, the router's first, and after a while make them."""
    for child in reversed(children):
        child.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and not all(child.exited() for child in children):
        time.sleep(POLL_SECONDS / 4)
    for child in children:
        child.kill()


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects the signals that ask for an end, in place of what they would do.

    In a list and not an event, whose lock the interrupted code may hold. Signals that are ignored
    (nohup) stay so, and only Python's main thread may ask for any.
    """
    came: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        came.append(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    try:
        yield came
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
