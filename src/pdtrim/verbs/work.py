"""The folder of a search under way: its text and its journal, so that it can be resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from pdtrim.errors import PdtrimError
from pdtrim.keep.files import CannotWrite
from pdtrim.keep.folder import claim_folder, is_there, remove

WHAT = "search under way"
NAMES = ("journal.jsonl", "text.safetensors")


class Work:
    """``PLAN.search``, gone when the search has ended; kept when it is interrupted.

    Raises:
        PdtrimError: an interrupted search is there and is not to be resumed, or the folder is not
            one of ours.
    """

    def __init__(self, folder: Path, *, resume: bool, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        self.resumed = is_there(folder, WHAT)
        if self.resumed and not resume:
            raise PdtrimError(
                f"{folder} holds an interrupted search: add --resume to go on, or delete it"
            )

    @property
    def journal(self) -> Path:
        """Of the search's measurements."""
        return self.folder / "journal.jsonl"

    def text(self, model: Any, config: Any, progress: Any) -> Any:
        """The calibration text, read or written once."""
        from pdtrim.calibration.kept import kept_calibration

        return kept_calibration(model, config, self.folder / "text.safetensors", progress=progress)

    def __enter__(self) -> Work:
        claim_folder(self.folder, WHAT)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt) and self.journal.exists():
            self.say("interrupted: the same command with --resume goes on")
        elif kind is None or (not self.resumed and _is_mistake(kind)):
            remove(self.folder, NAMES)


def _is_mistake(kind: type[BaseException]) -> bool:
    """Whether the search would end so again; a full disk is another matter."""
    return issubclass(kind, PdtrimError) and not issubclass(kind, CannotWrite)
