"""Served requests in a log that may still grow, one line at a time.

A line is one request as JSON::

    {"prompt": "text, or token ids", "answer": "text, or token ids", "time": 1764230400, "id": "r1"}

``prompt`` alone is needed. ``time`` is in seconds since 1970 or ISO 8601. Other keys are left
alone. Or the log is that of a vLLM server with ``--enable-log-requests`` and
``VLLM_LOGGING_LEVEL=DEBUG``, of which the lines with a prompt's token ids are read; they have no
time with a year, and vLLM writes answers of chats alone, which are not read.

What a line holds never stands in an error, nor in what a request prints.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pdtrim.errors import PdtrimError, border
from pdtrim.reading.json_text import parse_json
from pdtrim.reading.text import FOREIGN, GZIP, MAX_LINE

MAX_TOKENS = 2**20
"""Token ids of one prompt or answer."""
LAST_S = 32503680000.0
"""The year 3000."""
ASKED = re.compile(rb"Request (\S{1,200}) details: prompt: .*"
                   rb"prompt_token_ids: \[([\d, ]*)\], prompt_embeds shape: [^:]*\.$")  # fmt: skip

Words = str | tuple[int, ...]
"""A text, or token ids."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request.

    Attributes:
        key: what tells it from others, the same whenever the log is read.
        answer: None where the log has none.
        time: seconds since 1970; None where the log does not say.
    """

    key: bytes = field(repr=False)
    prompt: Words = field(repr=False)
    answer: Words | None = field(default=None, repr=False)
    time: float | None = None


class RequestLog:
    """A log, read on from where it was left.

    A log that was cut off or replaced is read from its beginning. Each line is read when its end
    has been written.

    Args:
        end: leave out what is there already.

    Raises:
        PdtrimError: no such file, or one of another kind.

    Attributes:
        at: bytes that were read.
    """

    def __init__(self, path: str | Path, *, end: bool = False) -> None:
        self.path = Path(path)
        self._long = False
        with self._file() as file:
            start = file.read(4096)
            for magic, what in (FOREIGN | {GZIP: "gzip data"}).items():
                if start.startswith(magic):
                    raise PdtrimError(f"{path} is {what}: give a log of one request a line")
            self._inode = os.fstat(file.fileno()).st_ino
            self.at = file.seek(0, os.SEEK_END if end else os.SEEK_SET)

    def read(self, *, last: bool = False) -> Iterator[Request | None]:
        """Requests that have been written since; None for a line of JSON that is none.

        Nothing while the file is away, as between the two steps of a rotation.

        Args:
            last: nothing more will be written, so that a line without an end is whole.

        Raises:
            PdtrimError: the file cannot be read.
        """
        if not self.path.exists():
            return
        with self._file() as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self.at:
                self._inode, self.at, self._long = status.st_ino, 0, False
            file.seek(self.at)
            while line := file.readline(MAX_LINE + 1):
                ended = line.endswith(b"\n")
                if not ended and len(line) <= MAX_LINE and not last:
                    return
                self.at += len(line)
                was_long, self._long = self._long, not ended and not last
                if was_long or self._long:
                    if not self._long:
                        yield None
                elif line.lstrip()[:1] == b"{":
                    yield _of_json(line)
                elif found := _of_vllm(line.rstrip()):
                    yield found

    @contextlib.contextmanager
    def _file(self) -> Iterator[Any]:
        with border(PdtrimError, f"cannot read {self.path}"):
            if not self.path.is_file():
                raise PdtrimError(f"no log at {self.path}: give a file of one request a line")
            file = self.path.open("rb")
        with file:
            yield file


def _of_vllm(line: bytes) -> Request | None:
    asked = ASKED.search(line)
    ids = _ids(asked[2]) if asked else None
    return Request(key=asked[1], prompt=ids) if asked and ids else None


def _ids(text: bytes) -> tuple[int, ...] | None:
    words = text.split(b",") if text else []
    if len(words) > MAX_TOKENS or any(len(word) > 10 for word in words):
        return None
    try:
        return tuple(int(word) for word in words)
    except ValueError:
        return None


def _of_json(line: bytes) -> Request | None:
    try:
        row = parse_json(line, where="a line")
    except PdtrimError:
        return None
    prompt, answer = _words(row.get("prompt")), _words(row.get("answer"))
    time = _time(row.get("time"))
    if not prompt or (answer is None and row.get("answer") is not None):
        return None
    if time is None and row.get("time") is not None:
        return None
    name = row.get("id")
    key = name.encode("utf-8", "replace") if isinstance(name, str) else line.strip()
    return Request(
        key=hashlib.sha256(key).digest(), prompt=prompt, answer=answer or None, time=time
    )


def _words(value: object) -> Words | None:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or len(value) > MAX_TOKENS:
        return None
    sound = all(type(item) is int and 0 <= item < 2**31 for item in value)
    return tuple(value) if sound else None


def _time(value: object) -> float | None:
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value.replace("Z", "+00:00"))
        except ValueError:
            return None
        zone = moment.tzinfo or timezone.utc
        with contextlib.suppress(OverflowError, ValueError):
            return _time(moment.replace(tzinfo=zone).timestamp())
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and 0 <= value < LAST_S else None
