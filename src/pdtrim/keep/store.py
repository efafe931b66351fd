"""Kept measurements: one JSON file each, with the settings that it was made by and a checksum.

A file appears when its measurement is done, whole or not at all, so an interruption costs no more
than what was under way. A file of other settings is refused: numbers of two runs that are not alike
must not meet in one table. So is a damaged one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from pdtrim.errors import PdtrimError
from pdtrim.keep.files import write_json
from pdtrim.keep.settings import Settings, check_same, plain
from pdtrim.reading.json_text import read_json

T = TypeVar("T")

SCHEMA = "pdtrim.kept/1"


def once(path: Path, kind: type[T], settings: Settings, make: Callable[[], T]) -> T:
    """What the file holds, or else what ``make`` returns, which is then written there.

    Args:
        kind: of the value, a record or a dataclass.
        settings: all that the value depends on.

    Raises:
        PdtrimError: the file was made by other settings, is damaged, or is none of ours.
    """
    schema: TypeAdapter[T] = TypeAdapter(kind)
    if path.exists():
        try:
            return schema.validate_python(_read(path, settings))
        except ValidationError as error:
            raise _foreign(path) from error
    value = make()
    _write(path, settings, schema.dump_python(value, mode="json"))
    return value


def claim(path: Path, settings: Settings) -> None:
    """Write down what a folder or a plan beside ``path`` is made by; the second time, check it.

    Raises:
        PdtrimError: it was made by other settings, or the file is damaged.
    """
    if path.exists():
        _read(path, settings)
    else:
        _write(path, settings, None)


def _read(path: Path, settings: Settings) -> Any:
    """A file's value, if its settings are these."""
    try:
        data = read_json(path)
    except PdtrimError as error:
        raise _foreign(path) from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise _foreign(path)
    found, value = data.get("settings"), data.get("value")
    if not isinstance(found, dict) or data.get("sha256") != _digest(found, value):
        raise _foreign(path)
    check_same(path, found, settings)
    return value


def _write(path: Path, settings: Settings, value: Any) -> None:
    made_by = plain(settings)
    digest = _digest(made_by, value)
    write_json(path, {"schema": SCHEMA, "settings": made_by, "value": value, "sha256": digest})


def _digest(settings: Settings, value: Any) -> str:
    text = json.dumps([settings, value], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _foreign(path: Path) -> PdtrimError:
    return PdtrimError(
        f"{path} is damaged or not a kept measurement: delete it, or give another -o"
    )
