"""The folder of a search under way: its text and its journal, so that it can be resumed."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from pdtrim.cli.common import err
from pdtrim.errors import PdtrimError


class Work:
    """``PLAN.search``, gone when the search has ended; kept when it is interrupted.

    Raises:
        PdtrimError: an interrupted search is there and is not to be resumed.
    """

    def __init__(self, folder: Path, *, resume: bool) -> None:
        if folder.exists() and not resume:
            raise PdtrimError(
                f"{folder} holds an interrupted search: add --resume to go on, or delete it"
            )
        self.folder = folder
        self.resumed = folder.exists()

    @property
    def journal(self) -> Path:
        """Of the search's measurements."""
        return self.folder / "journal.jsonl"

    def text(self, model: Any, config: Any, progress: Any) -> Any:
        """The calibration text, read or written once."""
        from pdtrim.calibration.batches import (
            load_calibration,
            save_calibration,
            saved_calibration,
        )

        path = self.folder / "text.safetensors"
        saved = saved_calibration(config, path)
        if saved is not None:
            return saved
        text = load_calibration(model, config, progress=progress)
        save_calibration(text, config, path)
        return text

    def __enter__(self) -> Work:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        elif issubclass(kind, KeyboardInterrupt) and self.journal.exists():
            err.print("interrupted: the same command with --resume goes on")
        elif issubclass(kind, PdtrimError) and not self.resumed:
            shutil.rmtree(self.folder, ignore_errors=True)
