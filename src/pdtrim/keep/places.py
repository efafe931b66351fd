"""Whether something can be written to a place, tried before the work and not after it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from pdtrim.errors import PdtrimError
from pdtrim.keep.files import check_regular


def need_file_place(path: Path) -> None:
    """Refuse a place where a file cannot be written, before the work and not after it.

    Raises:
        PdtrimError: as :func:`check_regular`, or its folder cannot be made or written to.
    """
    check_regular(path)
    _probe(path.parent)


def need_folder_place(path: Path) -> None:
    """Refuse a place where a folder cannot be made or written to, before the work.

    Raises:
        PdtrimError: a file is there, or it cannot be written to.
    """
    if path.exists() and not path.is_dir():
        raise PdtrimError(f"{path} is a file: name a folder")
    _probe(path)


def _probe(folder: Path) -> None:
    """Write and remove a file in the nearest folder that is there."""
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        handle, name = tempfile.mkstemp(prefix=".pdtrim-", dir=nearest)
        os.close(handle)
        os.unlink(name)
    except OSError as error:
        raise PdtrimError(f"cannot write to {nearest}: {error.strerror}") from error
