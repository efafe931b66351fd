"""JSON that may come from anywhere: bounded in size and depth, its numbers finite, its keys unique.

Python's reader takes NaN, lets the last of two equal keys win, raises errors of four kinds and
reads as much as there is. All that reads JSON in pdtrim reads it here.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pdtrim.errors import PdtrimError

MAX_BYTES = 64 * 2**20
MAX_DEPTH = 64


def read_json(
    path: str | Path, *, limit: int = MAX_BYTES, kind: type[PdtrimError] = PdtrimError
) -> Any:
    """The data of a JSON file.

    Args:
        limit: the largest file in bytes.
        kind: of the error.

    Raises:
        PdtrimError: no such file, one that is too large, or no JSON that pdtrim takes.
    """
    return parse_json(read_bytes(path, limit=limit, kind=kind), where=str(path), kind=kind)


def read_bytes(path: str | Path, *, limit: int, kind: type[PdtrimError] = PdtrimError) -> bytes:
    """A whole file whose size is checked before it is read.

    Raises:
        PdtrimError: no such file, an unreadable one, or one of more than ``limit`` bytes.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise kind(f"no file at {path}")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, PdtrimError):
            raise
        raise kind(f"cannot read {path}: {error}") from error
    if len(data) > limit:
        raise kind(f"{path} has more than {limit:,} bytes: too large for what it should be")
    return data


def parse_json(data: bytes | str, *, where: str, kind: type[PdtrimError] = PdtrimError) -> Any:
    """The data of a JSON text; a byte order mark is left out.

    Args:
        where: what an error calls the text.

    Raises:
        PdtrimError: not JSON, nested too deeply, a number that is not finite or too long, half a
            surrogate pair, or a key that an object has twice.
    """
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data.removeprefix("\ufeff")
        made = json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float
        )
        if "\\u" in text:  # an escape can be half a character, which no text can hold
            json.dumps(made, ensure_ascii=False).encode()
    except RecursionError:
        raise kind(f"{where} is no JSON that pdtrim takes: nested too deeply") from None
    except ValueError as error:  # JSON's own errors, UnicodeDecodeError, numbers too long
        raise kind(f"{where} is not valid JSON: {error}") from error
    if _depth(made) > MAX_DEPTH:
        raise kind(f"{where} is no JSON that pdtrim takes: nested more than {MAX_DEPTH} deep")
    return made


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:80]!r} stands twice in one object")
    return made


def _constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _depth(data: Any) -> int:
    """How deep lists and objects are nested, without recursion."""
    deepest, rest = 0, [(data, 1)]
    while rest:
        item, depth = rest.pop()
        if isinstance(item, dict | list):
            deepest = max(deepest, depth)
            values = item.values() if isinstance(item, dict) else item
            rest += [(value, depth + 1) for value in values if isinstance(value, dict | list)]
    return deepest
