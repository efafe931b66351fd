"""Documents of a text file, told apart by what is in the file and not by how it is called.

Plain text, JSON Lines, one JSON array (of texts, of objects with a text, or of Alpaca's
instructions), and tables with a column of text; each may be packed with gzip. What is something
else is refused in one line, so that markup is never taken for text. Files are read in pieces of
bounded size and only as far as documents are asked for.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pdtrim.errors import CalibrationError, border
from pdtrim.reading.json_text import parse_json

TEXT_FIELDS = ("text", "content", "context")
ALPACA_FIELDS = ("instruction", "input", "output")
PIECE = 4 * 2**20
"""Bytes of plain text that make one document at most; a longer file is several."""
MAX_LINE = 16 * 2**20
"""Bytes of one line of JSON Lines or of a table."""
MAX_ARRAY = 256 * 2**20
"""Bytes of a JSON array, which is read whole."""
FOREIGN = {
    b"GGUF": "a GGUF model",
    b"PAR1": "a Parquet table",
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "zstd data",
    b"BZh": "bzip2 data",
    b"\xfd7zXZ": "xz data",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"%PDF": "a PDF document",
    b"ARROW1": "an Arrow table",
    b"\x80\x04\x95": "a pickle file",
    b"\x1f\x8b": "packed twice",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"version https://git-lfs": "a Git LFS pointer",
}
GZIP = b"\x1f\x8b"
BOM = b"\xef\xbb\xbf"


def read_text(path: Path) -> Iterator[str]:
    """Documents of a file, lazily.

    Raises:
        CalibrationError: not such a file, damaged, not UTF-8, or without text.
    """
    with border(CalibrationError, f"cannot read {path}"), path.open("rb") as raw:
        packed = raw.peek(2)[:2] == GZIP
        with gzip.GzipFile(fileobj=raw) if packed else raw as stream:
            yield from _documents(io.BufferedReader(stream), path)


def _documents(stream: io.BufferedReader, path: Path) -> Iterator[str]:
    start = stream.peek(4096)[:4096]
    for magic, what in FOREIGN.items():
        if start.startswith(magic):
            raise CalibrationError(f"{path} is {what}: give UTF-8 text or JSON Lines")
    if start.startswith(BOM):
        stream.read(len(BOM))
    suffixes = {suffix.lower() for suffix in path.suffixes}
    first = stream.peek(4096)[:4096].lstrip()[:1]
    if suffixes & {".csv", ".tsv"}:
        yield from _table(stream, path, "\t" if ".tsv" in suffixes else ",")
    elif first == b"[" and not suffixes & {".jsonl", ".ndjson"}:
        yield from _array(stream, path, sure=".json" in suffixes)
    elif first == b"{" or suffixes & {".json", ".jsonl", ".ndjson"}:
        yield from _json_lines(stream, path, sure=bool(suffixes & {".json", ".jsonl", ".ndjson"}))
    else:
        yield from _plain(stream, path)


def _plain(stream: IO[bytes], path: Path, begun: bytes = b"") -> Iterator[str]:
    left = begun
    while True:
        piece = left + stream.read(PIECE - len(left)) if len(left) < PIECE else left
        if not piece:
            return
        last = len(piece) < PIECE
        stop = len(piece) if last else (piece.rfind(b"\n") + 1 or _whole_characters(piece))
        text = _utf8(piece[:stop], path)
        if text.strip():
            yield text
        left = piece[stop:]
        if last:
            return


def _whole_characters(piece: bytes) -> int:
    """Bytes up to the last character that is not cut off."""
    for back in range(1, 5):
        if piece[-back] & 0xC0 != 0x80:  # the first byte of a character
            return len(piece) - back
    return len(piece)


def _utf8(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not UTF-8 text ({error.reason}): convert it, as with 'iconv -t utf-8'"
        ) from error


def _lines(stream: IO[bytes], path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := stream.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise CalibrationError(f"{path} line {number} is longer than {MAX_LINE:,} bytes")
        yield number, line


def _json_lines(stream: IO[bytes], path: Path, *, sure: bool) -> Iterator[str]:
    for number, line in _lines(stream, path):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = parse_json(line, where=where, kind=CalibrationError)
        except CalibrationError:
            if sure or number > 1:
                raise
            yield from _plain(stream, path, line)  # text that begins with a bracket
            return
        yield text_of(row, where)


def _array(stream: IO[bytes], path: Path, *, sure: bool) -> Iterator[str]:
    data = stream.read(MAX_ARRAY + 1)
    if len(data) > MAX_ARRAY:
        raise CalibrationError(f"{path} is an array of more than {MAX_ARRAY:,} bytes: split it")
    try:
        rows = parse_json(data, where=str(path), kind=CalibrationError)
    except CalibrationError:
        if sure:
            raise
        yield from _plain(io.BytesIO(data), path)
        return
    for number, row in enumerate(rows, 1):
        yield text_of(row, f"{path} item {number}")


def _table(stream: IO[bytes], path: Path, delimiter: str) -> Iterator[str]:
    rows = csv.DictReader(
        (_utf8(line, path) for _, line in _lines(stream, path)), delimiter=delimiter
    )
    if not set(rows.fieldnames or ()) & set(TEXT_FIELDS):
        raise CalibrationError(
            f"{path} has no column named {', '.join(TEXT_FIELDS)}: name the text's column so"
        )
    for number, row in enumerate(rows, 1):
        yield text_of(row, f"{path} row {number}")


def text_of(row: object, where: str, fields: tuple[str, ...] = TEXT_FIELDS) -> str:
    """The text of one row: a text itself, an object's field, or an Alpaca instruction.

    Raises:
        CalibrationError: it has none.
    """
    if isinstance(row, str):
        return row
    if isinstance(row, dict):
        for field in fields:
            if isinstance(row.get(field), str):
                return str(row[field])
        alpaca = [row.get(field) for field in ALPACA_FIELDS]
        if isinstance(alpaca[0], str) and isinstance(alpaca[2], str):
            return "\n".join(part for part in alpaca if isinstance(part, str) and part)
    raise CalibrationError(f"{where} has no text: expected an object with one of {fields}")


def clean(text: str) -> str:
    """A text that every tokenizer takes: halves of surrogate pairs joined, lone ones replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
