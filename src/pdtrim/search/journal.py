"""A search's journal: what was measured, on disk at once, so that a killed search can go on.

Searches are deterministic for their seed, so resuming is replaying: the search runs again from its
start and takes each measurement from the journal instead of a forward, until the journal ends. One
JSON line a measurement, behind a header line that names the search.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pdtrim.errors import PlanError

SCHEMA = "pdtrim.journal/1"


class Journal:
    """Measurements in the order in which a search asks for them.

    Args:
        header: a hash of everything that the measurements depend on.

    Raises:
        PlanError: the file belongs to another search, or is no journal.
    """

    def __init__(self, path: str | Path, header: str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]  # a torn last line was being written: it is lost
        lines = [self._parse(line) for line in whole.splitlines()]
        wanted = {"schema": SCHEMA, "search": header}
        if lines and lines[0] != wanted:
            raise PlanError(
                f"{self.path} belongs to another search: its first line is {json.dumps(lines[0])},"
                f" wanted {json.dumps(wanted)}; name another file, or delete it"
            )
        self.old = lines[1:]
        self.at = 0
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))
        if not lines:
            self._write(wanted)

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
        values = entry.pop("values", [])
        if entry != key:
            raise PlanError(
                f"{self.path}, line {self.at + 2}: the search asks for {json.dumps(key)}, the"
                f" journal holds {json.dumps(entry)}; delete the file to start anew"
            )
        self.at += 1
        return values

    def _parse(self, line: bytes) -> dict[str, Any]:
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            raise PlanError(f"{self.path} is no journal of a search: name another file")
        return entry

    def _write(self, entry: dict[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
