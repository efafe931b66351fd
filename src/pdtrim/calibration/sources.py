"""Where text comes from: a file, or a hub data set. One string a document."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pdtrim.errors import CalibrationError, border
from pdtrim.reading.text import TEXT_FIELDS, read_text, text_of

MAX_DOCUMENTS = 200_000


def read_documents(source: str) -> Iterator[str]:
    """Documents of a source, lazily.

    Args:
        source: a file as ``reading/text.py`` takes it, or ``hub:NAME[:SPLIT[:FIELD]]``.

    Raises:
        CalibrationError: not found, unreadable, or without text.
    """
    if source.startswith("hub:"):
        return _hub(source)
    path = Path(source)
    with border(CalibrationError, f"cannot read {source}"):
        if not path.is_file():
            raise CalibrationError(
                f"no text file at '{source}': give a .txt or .jsonl file, hub:NAME, or 'self'"
            )
    return read_text(path)


def _hub(source: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            "a hub data set needs the package datasets: pip install 'pdtrim[hub]'"
        ) from error
    name, _, rest = source.removeprefix("hub:").partition(":")
    split, _, field = rest.partition(":")
    with border(CalibrationError, f"cannot read {source}"):
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
        for number, row in enumerate(rows):
            if number >= MAX_DOCUMENTS:
                return
            yield text_of(row, source, (field,) if field else TEXT_FIELDS)
