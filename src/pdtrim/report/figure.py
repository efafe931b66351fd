"""What all pictures share: a figure that needs no screen, and its file, written whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pdtrim.errors import PdtrimError
from pdtrim.keep.files import whole


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches.

    Raises:
        PdtrimError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PdtrimError("a plot needs matplotlib: pip install 'pdtrim[plot]'") from error
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path, **options: Any) -> Path:
    """Write the figure in the format that the file's name ends in.

    Raises:
        CannotWrite: the system refuses to write; what was there is as it was.
    """
    with whole(path) as part:
        figure.savefig(part, format=path.suffix[1:], **options)
    return path
