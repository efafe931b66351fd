"""Outputs of the verbs: a file, or a folder that carries a mark; others' things stay untouched.

A folder that pdtrim works in holds ``.pdtrim.json``, which says what it is for. One that holds
other files and no mark is refused, and removal takes what pdtrim wrote and no more.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from pdtrim.errors import PdtrimError
from pdtrim.keep.files import PART, beside, cannot_write, check_ours, remove_parts, write_json
from pdtrim.keep.lock import lock
from pdtrim.reading.json_text import read_json

SCHEMA = "pdtrim.folder/1"
MARK = ".pdtrim.json"
LOCK = ".pdtrim.lock"
MAX_MARK_BYTES = 4096


@contextlib.contextmanager
def output_file(path: Path) -> Iterator[None]:
    """Hold an output file for the block: locked, and none of anybody else's.

    The folder is made, so that one that cannot be written to is found before the work.

    Raises:
        PdtrimError: a foreign file is there, another run writes it, or the folder cannot be
            written to.
    """
    target = Path(os.path.realpath(path))
    try:
        check_ours(path)
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
    with lock(beside(target, ".lock"), str(path)):
        remove_parts(path)
        yield


@contextlib.contextmanager
def output_folder(folder: Path, what: str, *, shared: bool = False) -> Iterator[None]:
    """Hold an output folder for the block: made or ours, marked, locked.

    A new folder into which nothing was written is removed again.

    Args:
        what: the folder is for.
        shared: with others that do parts of the same work.

    Raises:
        PdtrimError: a foreign folder, one for something else, or another run writes to it.
    """
    new = not folder.exists()
    claim_folder(folder, what)
    try:
        with lock(folder / LOCK, str(folder), shared=shared):
            yield
    finally:
        if new and folder.is_dir() and [path.name for path in folder.iterdir()] == [MARK]:
            remove(folder, ())


def is_there(folder: Path, what: str) -> bool:
    """Whether a marked folder is there; False for none, or for an empty one.

    Raises:
        PdtrimError: it is a file, holds what pdtrim did not write, or is for something else.
    """
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise PdtrimError(f"{folder} is a file: give the name of a folder")
    mark = folder / MARK
    if mark.is_file():
        found = read_json(mark, limit=MAX_MARK_BYTES)
        if found == _mark(what):
            return True
        other = found.get("what") if isinstance(found, dict) else None
        raise PdtrimError(f"{folder} is a folder for '{other}', not for '{what}': give another -o")
    others = sorted(path.name for path in folder.iterdir() if not _passing(path.name))
    if others:
        raise PdtrimError(
            f"{folder} holds '{others[0]}' and no mark of pdtrim: give a new or an empty folder,"
            " or another -o"
        )
    return False


def claim_folder(folder: Path, what: str) -> None:
    """Make a folder and mark it, unless that is done.

    Raises:
        PdtrimError: as :func:`is_there`, or it cannot be written.
    """
    if is_there(folder, what):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    write_json(folder / MARK, _mark(what))


def remove(folder: Path, names: Iterable[str]) -> None:
    """Remove files of ours from a marked folder, then the mark, then the folder if it is empty.

    Args:
        names: of our files in it, ``*`` allowed. Everything else stays.
    """
    if not (folder / MARK).is_file():
        return
    wanted = tuple(names)
    for path in list(folder.iterdir()):
        ours = any(fnmatch.fnmatchcase(path.name, name) for name in wanted)
        if (ours or _passing(path.name)) and not path.is_dir():
            path.unlink(missing_ok=True)
    (folder / MARK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _mark(what: str) -> dict[str, str]:
    return {"schema": SCHEMA, "what": what}


def _passing(name: str) -> bool:
    """Files that are there only while pdtrim works."""
    return name == LOCK or PART.fullmatch(name) is not None
