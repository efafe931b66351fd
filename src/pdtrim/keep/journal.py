"""A journal: what was measured, on disk at once, so that killed work can go on.

Searches are deterministic for their seed, so resuming is replaying: the search runs again from its
start and takes each measurement from the journal instead of a forward, until the journal ends.

One JSON line a measurement, behind a header line with the settings of the search. ``check`` in each
line is a hash over the line and the ``check`` of the line before, so that no line can be altered,
left out or moved. The last line of a killed process may be cut: it is dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pdtrim.errors import PdtrimError, PlanError
from pdtrim.keep.files import cannot_write, sync_folder
from pdtrim.keep.settings import Settings, check_same, plain

SCHEMA = "pdtrim.journal/2"
MAX_BYTES = 2**30


class Journal:
    """Measurements in the order in which a search asks for them.

    Args:
        settings: everything that the measurements depend on.

    Raises:
        PdtrimError: the file belongs to a search of other settings, is damaged, or is no journal.
    """

    def __init__(self, path: str | Path, settings: Settings) -> None:
        self.path = Path(path)
        self.check = ""
        self.at = 0
        self.old: list[dict[str, Any]] = []
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            data = self._bytes()
        except OSError as error:
            raise cannot_write(self.path, error) from error
        kept = data[: data.rfind(b"\n") + 1]  # a torn last line was being written: it is lost
        lines = [self._parse(number, line) for number, line in enumerate(kept.splitlines(), 1)]
        if lines:
            header = lines[0]
            if header.get("schema") != SCHEMA or not isinstance(header.get("settings"), dict):
                raise self._foreign()
            check_same(self.path, header["settings"], settings)
            self.old = lines[1:]
        if len(kept) < len(data):
            os.truncate(self.path, len(kept))
        if not lines:
            self._write({"schema": SCHEMA, "settings": plain(settings)})
            sync_folder(self.path.parent)

    def once(self, key: dict[str, Any], measure: Callable[[], list[Any]]) -> list[Any]:
        """The measurement that the journal holds at this place, else a new one, written down.

        Raises:
            PlanError: the journal holds another measurement here.
        """
        if self.at == len(self.old):
            values = measure()
            self._write({**key, "values": values})
            return values
        entry = dict(self.old[self.at])
        values = entry.pop("values", None)
        if entry != plain(key) or not isinstance(values, list):
            raise PlanError(
                f"{self.path}, line {self.at + 2}: the search asks for {json.dumps(key)}, the"
                f" journal holds {json.dumps(entry)}; delete the file to start anew"
            )
        self.at += 1
        return values

    def holds(self, key: dict[str, Any]) -> bool:
        """Whether an earlier run wrote this at this place. False where it had not come so far."""
        entry = dict(self.old[self.at]) if self.at < len(self.old) else {}
        entry.pop("values", None)
        return entry == plain(key)

    @property
    def replaying(self) -> bool:
        """Whether what an earlier run measured is still to come."""
        return self.at < len(self.old)

    def _bytes(self) -> bytes:
        if not self.path.exists():
            return b""
        if not self.path.is_file() or self.path.stat().st_size > MAX_BYTES:
            raise self._foreign()
        return self.path.read_bytes()

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        check = entry.pop("check", None) if isinstance(entry, dict) else None
        if check != _check(self.check, entry):
            if number == 1:
                raise self._foreign()
            raise PlanError(
                f"{self.path}, line {number} is damaged: remove that line and all behind it to go"
                " on from there, or delete the file to start anew"
            )
        self.check = check
        return entry

    def _write(self, entry: dict[str, Any]) -> None:
        check = _check(self.check, entry)
        try:
            with self.path.open("ab", buffering=0) as file:
                size = file.tell()
                try:
                    rest = json.dumps({**entry, "check": check}).encode() + b"\n"
                    while rest:  # a nearly full disk takes a part, and says why at the next call
                        rest = rest[file.write(rest) :]
                    os.fsync(file.fileno())
                except BaseException:
                    file.truncate(size)
                    raise
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self.check = check

    def _foreign(self) -> PdtrimError:
        return PlanError(
            f"{self.path} is damaged or no journal of this version: delete it, or name another"
        )


def _check(before: str, entry: Any) -> str:
    text = before + json.dumps(entry)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
