"""One page of HTML for whoever decides about a fleet: what ``pdtrim report`` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from pdtrim.keep.files import write_text
from pdtrim.keep.places import need_file_place


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """How the page is headed.

    Attributes:
        title: of the page.
    """

    title: str = "pdtrim: dense beside pruned"


def write_report(
    runs: Sequence[str | Path], out: str | Path, config: ReportConfig | None = None
) -> Path:
    """Write one self-contained HTML file of what runs left; it loads nothing from anywhere.

    Args:
        runs: plans, pairs' folders, and the files or folders that other verbs wrote, in the order
            in which the page shows them.
        out: the file, which is replaced.
        config: :class:`ReportConfig` if not given.

    Returns:
        The page's path.

    Raises:
        PdtrimError: a run that is missing, damaged, too large or not understood, which is named;
            or ``out`` cannot be written.
    """
    from pdtrim.report.page.render import render
    from pdtrim.report.page.runs import read_runs
    from pdtrim.versions import versions

    place, config = Path(out), config or ReportConfig()
    need_file_place(place)
    read = read_runs([str(run) for run in runs])
    day = datetime.now(timezone.utc).date().isoformat()
    made = f"Made by pdtrim {versions()['pdtrim']} on {day}"
    write_text(place, render(read, title=config.title, made=made))
    return place
