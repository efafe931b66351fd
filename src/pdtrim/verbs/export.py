"""Write the two checkpoints of a plan: what ``pdtrim export`` does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pdtrim.keep.places import need_folder_place
from pdtrim.progress import Progress, silent

if TYPE_CHECKING:
    from pdtrim.bundle import TrimPlan
    from pdtrim.models.model import Model


def export_pair(
    plan: TrimPlan | str | Path,
    folder: str | Path,
    *,
    model: Model | str | None = None,
    probe: bool = True,
    dtype: str = "bfloat16",
    progress: Progress = silent,
) -> Path:
    """Write ``folder/prefill`` and ``folder/decode``.

    Args:
        plan: a plan with its weights, or a plan file.
        model: the plan's dense model, or where it is; where the plan says if None.
        probe: refuse KV codecs under which the model loses its needles (``evaluate/kv_probe.py``).
            A model without a tokenizer is not probed.
        dtype: type of the weights of a model that is loaded here.

    Returns:
        The folder.

    Raises:
        PdtrimError: no such plan, another model, codecs that break it, or a folder that holds
            something else.
    """
    from pdtrim.bundle import TrimPlan
    from pdtrim.evaluate.kv_probe import check_codecs
    from pdtrim.exported import base_model

    folder = Path(folder)
    need_folder_place(folder)
    trim = plan if isinstance(plan, TrimPlan) else TrimPlan.open(plan)
    with progress("exporting", 3) as advance:
        if model is None or isinstance(model, str):
            dense = base_model(trim.plan, source=model, dtype=dtype)
        else:
            dense = model
        advance(1)
        if probe and dense.tokenizer is not None:
            check_codecs(dense, trim.plan)
        advance(1)
        return trim.export(dense, folder)
