"""Compare methods, and write what came out: what ``pdtrim compare`` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pdtrim.errors import PdtrimError
from pdtrim.keep.files import write_text
from pdtrim.keep.folder import output_folder
from pdtrim.progress import Progress, silent
from pdtrim.verbs.model import dense_model

if TYPE_CHECKING:
    from pdtrim.evaluate.compare.records import Comparison
    from pdtrim.evaluate.configs import CompareConfig
    from pdtrim.models.model import Model


def compare_methods(
    model: Model | str,
    config: CompareConfig,
    folder: str | Path,
    *,
    only: Sequence[str] = (),
    dtype: str = "bfloat16",
    device: str = "cpu",
    progress: Progress = silent,
    say: Callable[[str], None] = lambda text: None,
) -> Comparison | None:
    """Plan by every method at one share removed and run the tasks on each pair.

    Args:
        model: the dense model, or its name, which is loaded with ``dtype`` to ``device``.
        folder: gets ``result.json``, ``table.md`` and ``compare.png``. What is there already and
            was made by the same settings is not made again.
        only: measure these parts alone and write no table, for processes side by side: ``dense``,
            names of systems, or ``NAME-seedN``.
        say: takes a line for people.

    Returns:
        The comparison; None if ``only`` some parts were measured.

    Raises:
        PdtrimError: an unknown task or method, unreadable text or plans, or a folder of other
            settings.
    """
    from pdtrim.evaluate.compare.run import compare, measure_part, parts_of
    from pdtrim.report.compare import markdown, plot_compare

    folder = Path(folder)
    parts_of(config, only)  # a typing mistake should not wait for the model
    with output_folder(folder, "comparison", shared=bool(only)):
        dense = dense_model(model, dtype=dtype, device=device, progress=progress)
        if only:
            measure_part(dense, config, folder, only, progress=progress, say=say)
            return None
        result = compare(dense, config, folder, progress=progress, say=say)
        result.save(folder / "result.json")
        write_text(folder / "table.md", markdown(result))
        try:
            plot_compare(result, folder / "compare.png")
        except PdtrimError as error:  # the numbers are there, with a picture or without
            say(f"no picture: {error}")
    return result
