"""A job of the page: a command, what it needs and what it leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(kw_only=True)
class Job:
    """A process to run.

    Attributes:
        name: of its log and of the file that says it is done.
        group: what it is counted under.
        command: a verb of pdtrim with its options, or a script with its own.
        gigabytes: of a GPU's memory that it may take, at most.
        needs: files without which it cannot begin.
        makes: files without which it has failed, whatever its exit status.
        alone: nothing else may run on its GPU.
    """

    name: str
    group: str
    command: list[str]
    gigabytes: float
    needs: tuple[Path, ...] = ()
    makes: tuple[Path, ...] = ()
    alone: bool = False

    def ready(self) -> bool:
        """Whether all that it needs is there."""
        return all(path.exists() for path in self.needs)
