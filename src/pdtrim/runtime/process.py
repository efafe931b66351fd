"""One stage process, as the session sees it: its orders, its events, its signs of life, its log."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pdtrim.errors import PdtrimError, RuntimeFailure
from pdtrim.runtime.control import ALIVE, BEAT_S, MAX_WORDS, Message
from pdtrim.runtime.start import child_env, python_module

if TYPE_CHECKING:
    from pdtrim.plan import Stage

STEP_S = 0.5
CLOSE_S = 1.0
LOG_TAIL = 1 << 14
UNPRINTABLE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a session waits for a stage process before it gives up and ends it.

    Attributes:
        start_s: without a sign of life while it starts; loading libraries can block it for long.
        silence_s: the same once it is ready.
        event_s: for any one answer (a loaded model, a batch's prefill, a token) of a process that
            does live.
    """

    start_s: float = 120.0
    silence_s: float = 30.0
    event_s: float = 1800.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) >= 2 * BEAT_S:
                raise PdtrimError(
                    f"{field.name} {getattr(self, field.name)} must be at least {2 * BEAT_S:g}"
                )


class StageProcess:
    """One running stage.

    A thread of its own starts the process and reads it to its end, because the kernel ends a
    process with the *thread* that started it. Another one writes, so that neither a process that
    does not read nor a Ctrl-C in the middle of an order can harm the session.

    Args:
        device: where its model runs.

    Raises:
        RuntimeFailure: it cannot be started.
    """

    def __init__(self, stage: Stage, folder: Path, patience: Patience, device: str = "cpu") -> None:
        self.stage = stage
        self.patience = patience
        self.others: Sequence[StageProcess] = ()  # that must live while this one is waited for
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self.channel, self._their_channel = socket.socketpair()
        self._orders: queue.SimpleQueue[tuple[str, socket.socket | None] | None]
        self._orders = queue.SimpleQueue()
        self._events: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._number = 0
        self._ready = False
        self._signs = self._seen = 0
        self._silent_s = 0.0
        self._started = threading.Event()
        self._problem: OSError | None = None
        self._reader = threading.Thread(target=self._run, args=(folder, device), daemon=True)
        self._writer = threading.Thread(target=self._write, daemon=True)
        try:
            self._reader.start()
            self._started.wait()
            if self._problem is not None:
                raise RuntimeFailure(f"cannot start the {stage} process: {self._problem}")
            self._writer.start()
        except BaseException:
            self.close()
            raise

    def order(self, op: str, *, give: socket.socket | None = None, **fields: Any) -> int:
        """Ask for something, and abandon what was asked for before; returns the order's number.

        Args:
            give: a socket that the process gets with the order; it is closed here.
        """
        self._number += 1
        line = json.dumps({"op": op, "id": self._number, **fields}) + "\n"
        self._orders.put((line, give))
        return self._number

    def event(self, number: int) -> Message:
        """The next event of an order.

        Raises:
            RuntimeFailure: the stage refused the order, ended, or gave no sign of life; or a later
                order has been given.
        """
        if number != self._number:
            raise RuntimeFailure(f"{self.stage}: a later request has ended this one")
        message = self._next(number)
        if message["event"] == "error":
            raise RuntimeFailure(f"{self.stage}: {message['message']}")
        self._ready = True
        return message

    def end(self) -> None:
        """Have the process end, without a wait for it."""
        self._orders.put(None)

    def close(self) -> None:
        """End the process, gently first."""
        self.end()
        try:
            if self._runs():
                self.process.wait(timeout=CLOSE_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._kill()
            self.channel.close()
            self.log.close()

    def _runs(self) -> bool:
        """Whether the process was started at all."""
        if self._reader.ident is None:
            return False
        self._started.wait()
        return self._problem is None

    def _next(self, number: int) -> Message:
        waited = 0.0
        for process in (self, *self.others):
            process._silent_s = 0.0
        while True:
            try:
                message = self._events.get(timeout=STEP_S)
            except queue.Empty:
                # time counts in steps that this process itself lived through: it may be stopped too
                waited += STEP_S
                for process in (self, *self.others):
                    process._check_alive()
                if waited >= self.patience.event_s:
                    raise self._given_up(f"did not answer within {waited:g} s") from None
                continue
            if message is None:
                self._events.put(None)
                raise self._ended()
            if message["id"] == number:
                return message

    def _check_alive(self) -> None:
        if self.process.poll() is not None:
            raise self._ended()
        self._silent_s = self._silent_s + STEP_S if self._signs == self._seen else 0.0
        self._seen = self._signs
        most = self.patience.silence_s if self._ready else self.patience.start_s
        if self._silent_s >= most:
            raise self._given_up(f"gave no sign of life for {self._silent_s:g} s")

    def _given_up(self, what: str) -> RuntimeFailure:
        self._kill()
        return RuntimeFailure(f"the {self.stage} process {what}: it was ended")

    def _kill(self) -> None:
        """End it even if it is stopped, and the threads that speak with it."""
        if not self._runs():
            return
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join()
        if self._writer.ident is not None:
            self._orders.put(None)
            self._writer.join()

    def _ended(self) -> RuntimeFailure:
        """Why it ended: in its own words to the session, else its last ones to the log."""
        self._kill()
        said = iter(self._events.get, None)  # the reader's last word is None
        errors = [m["message"] for m in said if (m["event"], m["id"]) == ("error", self._number)]
        self._events.put(None)  # for whoever asks again
        if errors:
            return RuntimeFailure(f"{self.stage}: {errors[0]}")
        code = self.process.returncode
        how = f"exit {code}" if code >= 0 else f"killed by {_signal_name(-code)}"
        return RuntimeFailure(f"the {self.stage} process ended ({how}): {last_words(self.log)}")

    def _run(self, folder: Path, device: str) -> None:
        # a process group of its own: Ctrl-C reaches the session, which then ends the stages
        channel = self._their_channel.fileno()
        arguments = (self.stage, str(folder), str(os.getpid()), str(channel), device)
        try:
            self.process = subprocess.Popen(
                python_module("pdtrim.runtime.stage", *arguments),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log,
                env=child_env(),
                pass_fds=(channel,),
                start_new_session=True,
                text=True,
                encoding="utf-8",
            )
        except OSError as error:
            self._problem = error
            return
        finally:
            self._their_channel.close()
            self._started.set()
        assert self.process.stdout is not None
        try:
            with self.process.stdout as lines:
                for line in lines:
                    message = json.loads(line)
                    self._signs += 1
                    if message["event"] != ALIVE:
                        self._events.put(message)
        except ValueError:
            pass  # it was killed in the middle of a line
        finally:
            self._events.put(None)

    def _write(self) -> None:
        assert self.process.stdin is not None
        try:
            with self.process.stdin as orders:
                while (item := self._orders.get()) is not None:
                    line, given = item
                    if given is not None:
                        with given:
                            socket.send_fds(self.channel, [b"\0"], [given.fileno()])
                    orders.write(line)
                    orders.flush()
        except OSError:
            return  # it ended: whoever waits for its answer is told


def last_words(log: IO[bytes]) -> str:
    """The last line of a log that says something, without what a terminal would act on."""
    end = log.seek(0, os.SEEK_END)
    log.seek(max(0, end - LOG_TAIL))
    text = log.read().decode(errors="replace")
    lines = [UNPRINTABLE.sub("", line).strip() for line in text.splitlines()]
    return next((line[:MAX_WORDS] for line in reversed(lines) if line), "no message")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
