"""Write a file whole or not at all: a temporary file beside it, fsync, rename, fsync of the folder.

A full disk, an interruption or a kill leaves the old file as it was. A kill may leave the temporary
file too, ``.NAME.0123456789abcdef.part``; the next run with the same output removes it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pdtrim.errors import PdtrimError
from pdtrim.reading.json_text import read_json

PART = re.compile(r"\..+\.[0-9a-f]{16}\.part")
CHUNK = 2**20


class CannotWrite(PdtrimError):
    """The system refuses to write, as on a full disk; unfinished work is worth keeping."""


@contextlib.contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A temporary file to write to, which becomes ``path`` when the block ends without an error.

    Folders on the way are made. Where ``path`` is a link it stays one: the file that it leads to is
    replaced. An old file's permissions go over to the new one.

    Raises:
        PdtrimError: ``path`` is no regular file.
        CannotWrite: the system refuses to write; what was there is as it was.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    try:
        check_regular(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = _new_part(target)
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        yield part
        _publish(part, target)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        PdtrimError: as :func:`whole`.
    """
    with whole(path) as part:
        part.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    r"""The same for text: UTF-8, ``\n`` ends a line; half a surrogate is written as ``\udc80``."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: str | Path, data: Any) -> None:
    """The same for plain data."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def check_regular(path: Path) -> None:
    """Raise PdtrimError if there is something other than a file: a folder, a device, a pipe."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise PdtrimError(f"{path} is a folder: give the name of a file")
        if not stat.S_ISREG(mode):
            raise PdtrimError(f"{path} is a device or a pipe: give the name of a file")


def check_ours(path: Path) -> None:
    """Raise PdtrimError if a file is there that pdtrim did not write; an empty one is nobody's."""
    check_regular(path)
    if not path.exists() or path.stat().st_size == 0:
        return
    try:
        data = read_json(path)
    except PdtrimError:
        data = None
    schema = data.get("schema") if isinstance(data, dict) else None
    if not (isinstance(schema, str) and schema.startswith("pdtrim.")):
        raise PdtrimError(f"{path} is there and not from pdtrim: give another -o, or move it away")


def remove_parts(path: Path) -> None:
    """Remove temporary files of ``path`` that killed processes left; for who alone writes it."""
    target = Path(os.path.realpath(path))
    with contextlib.suppress(OSError):
        for other in target.parent.iterdir():
            if PART.fullmatch(other.name) and other.name[:-22] == f".{_short(target.name)}":
                other.unlink(missing_ok=True)


def beside(path: Path, ending: str) -> Path:
    """A hidden file's name beside ``path``, short enough for every file system."""
    return path.with_name(f".{_short(path.name)}{ending}")


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on the disk, where the file system can."""
    place = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(place)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(place)


def sync_file(path: Path) -> None:
    """Put a file's bytes on the disk."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def cannot_write(path: Path, error: Exception) -> CannotWrite:
    """What a failed write is to the user, in one line."""
    why = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return CannotWrite(f"cannot write {path}: {why}; nothing was replaced")


def _new_part(target: Path) -> Path:
    part = beside(target, f".{secrets.token_hex(8)}.part")
    os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    return part


def _publish(part: Path, target: Path) -> None:
    sync_file(part)
    with contextlib.suppress(FileNotFoundError):
        part.chmod(stat.S_IMODE(target.stat().st_mode))
    os.replace(part, target)
    sync_folder(target.parent)


def _short(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[:180])
