"""The dense model of a verb: one that is loaded, or a name to load."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pdtrim.progress import Progress

if TYPE_CHECKING:
    from pdtrim.models.model import Model


def dense_model(model: Model | str, *, dtype: str, device: str, progress: Progress) -> Model:
    """The model itself, or the one of this name, loaded.

    Raises:
        PdtrimError: no such model, or one that is not supported.
    """
    if not isinstance(model, str):
        return model
    from pdtrim.models.loading import load_model

    with progress("loading the model", 1):
        return load_model(model, dtype=dtype, device=device)
