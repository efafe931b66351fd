"""Locks: two runs must not write to one output at once. A kill releases its lock.

A lock is ``flock`` on a small file that holds the owner's process number. The owner removes the
file when it is done; one that a killed process left locks nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from pdtrim.errors import PdtrimError


@contextlib.contextmanager
def lock(path: Path, what: str, *, shared: bool = False) -> Iterator[None]:
    """Hold a lock for the block.

    Args:
        path: the lock's file, in a folder that exists.
        what: is locked, for the error: the output, or a part of it.
        shared: with others that share it, but with nobody who holds it alone.

    Raises:
        PdtrimError: somebody else holds it, or the file system cannot lock.
    """
    place = _take(path, what, shared)
    try:
        yield
    finally:
        _release(place, path, shared)


def _take(path: Path, what: str, shared: bool) -> int:
    import fcntl  # not on every system, and not needed to read

    while True:
        try:
            place = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise PdtrimError(f"cannot write to {path.parent}: {error.strerror}") from error
        try:
            fcntl.flock(place, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if _is_at(place, path):
                os.ftruncate(place, 0)
                os.pwrite(place, str(os.getpid()).encode(), 0)
                return place
        except BlockingIOError:
            holder = os.pread(place, 20, 0)
            os.close(place)
            number = f"process {int(holder)}" if holder.isdigit() else "another process"
            raise PdtrimError(
                f"{what} is being written by {number}: wait for it, or give another -o"
            ) from None
        except OSError as error:
            os.close(place)
            raise PdtrimError(
                f"cannot lock {what}: {error.strerror}; give an -o on a local disk"
            ) from error
        os.close(place)  # its owner was done and removed it between the two calls: once more


def _release(place: int, path: Path, shared: bool) -> None:
    import fcntl

    try:
        if shared:  # the last of them removes the file
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(place, path):
            path.unlink()
    except OSError:
        pass  # others share it still; or the file stays, and locks nothing
    finally:
        os.close(place)


def _is_at(place: int, path: Path) -> bool:
    """Whether an open file is the one that the path leads to now."""
    try:
        return os.path.samestat(os.fstat(place), os.stat(path))
    except FileNotFoundError:
        return False
