"""Where text comes from: a text file, JSON lines, or a hub data set. One string a document."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pdtrim.errors import CalibrationError

MAX_DOCUMENTS = 200_000
TEXT_FIELDS = ("text", "content", "context")


def read_documents(source: str) -> Iterator[str]:
    """Documents of a source, lazily.

    Args:
        source: ``FILE.txt``, ``FILE.jsonl`` (or ``.jsonl.gz``; field text, content or context), or
            ``hub:NAME[:SPLIT[:FIELD]]``.

    Raises:
        CalibrationError: not found, unreadable, or without text.
    """
    if source.startswith("hub:"):
        return _hub(source)
    path = Path(source)
    if not path.is_file():
        raise CalibrationError(
            f"no text file at '{source}': give a .txt or .jsonl file, hub:NAME, or 'self'"
        )
    return _json_lines(path) if ".jsonl" in path.suffixes else _plain(path)


def _plain(path: Path) -> Iterator[str]:
    try:
        yield path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text: {error.reason}") from error


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _json_lines(path: Path) -> Iterator[str]:
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _text_of(json.loads(line), f"{path} line {number}")
    except (json.JSONDecodeError, UnicodeDecodeError, gzip.BadGzipFile) as error:
        raise CalibrationError(f"{path} is not JSON lines: {error}") from error


def _text_of(row: object, where: str, fields: tuple[str, ...] = TEXT_FIELDS) -> str:
    for field in fields:
        if isinstance(row, dict) and isinstance(row.get(field), str):
            return str(row[field])
    raise CalibrationError(f"{where} has no text: expected an object with one of {fields}")


def _hub(source: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            "a hub data set needs the package datasets: pip install 'pdtrim[hub]'"
        ) from error
    name, _, rest = source.removeprefix("hub:").partition(":")
    split, _, field = rest.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
        for number, row in enumerate(rows):
            if number >= MAX_DOCUMENTS:
                return
            yield _text_of(row, source, (field,) if field else TEXT_FIELDS)
    except (OSError, ValueError) as error:
        raise CalibrationError(f"cannot read {source}: {str(error).splitlines()[0]}") from error
