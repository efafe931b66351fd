"""What a comparison keeps on disk: one file a measurement, with the settings that it was made by.

A file appears when its measurement is done, whole or not at all, so an interruption costs no more
than what was under way. A file of other settings is refused: numbers of two runs that are not alike
must not meet in one table.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from pdtrim.errors import PdtrimError

T = TypeVar("T")

Settings = dict[str, Any]
"""Plain data, as JSON gives it back."""

MAX_BYTES = 256 * 2**20


def once(path: Path, kind: type[T], settings: Settings, make: Callable[[], T]) -> T:
    """What the file holds, or else what ``make`` returns, which is then written there.

    Args:
        kind: of the value, a record or a dataclass.
        settings: all that the value depends on.

    Raises:
        PdtrimError: the file was made by other settings, or is none of ours.
    """
    schema: TypeAdapter[T] = TypeAdapter(kind)
    if path.is_file():
        try:
            return schema.validate_python(_read(path, settings)["value"])
        except (KeyError, ValidationError) as error:
            raise _foreign(path) from error
    value = make()
    _write(path, {"settings": settings, "value": schema.dump_python(value, mode="json")})
    return value


def claim(path: Path, settings: Settings) -> None:
    """Write down what a folder or a plan beside ``path`` is made by; the second time, check it.

    Raises:
        PdtrimError: it was made by other settings.
    """
    if path.is_file():
        _read(path, settings)
    else:
        _write(path, {"settings": settings})


def _read(path: Path, settings: Settings) -> dict[str, Any]:
    """A file's data, if its settings are these."""
    if path.stat().st_size > MAX_BYTES:
        raise _foreign(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise _foreign(path) from error
    found = data.get("settings") if isinstance(data, dict) else None
    if not isinstance(found, dict):
        raise _foreign(path)
    before, now = _flat(found), _flat(settings)
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old != new:
            raise PdtrimError(
                f"{path} was made with {key} {_short(old)}, now it is {_short(new)}: delete it, or"
                " give another -o"
            )
    return data


def _write(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def _foreign(path: Path) -> PdtrimError:
    return PdtrimError(f"{path} is not a file of a comparison: delete it, or give another -o")


def _flat(settings: Settings) -> Settings:
    """Nested settings by dotted names, so that an error can name the one that differs."""
    flat: Settings = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": part for inner, part in _flat(value).items()}
        else:
            flat[key] = value
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
