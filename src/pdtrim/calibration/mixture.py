"""Text of several sources in one batch, for training: it takes more than one file often has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from pdtrim.calibration.batches import CalibrationConfig, read_sequences
from pdtrim.errors import CalibrationError
from pdtrim.models.model import Model
from pdtrim.progress import Progress, silent
from pdtrim.stage.forward import Batch


def load_mixture(
    model: Model,
    sources: Sequence[str],
    config: CalibrationConfig,
    *,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Batch, Batch]:
    """Training text and held-out text that share no token.

    Args:
        config: ``search`` sequences of each source are trained on, or all it has, which is said;
            ``rerank`` of each are held out. Its ``source`` and ``fit`` are not read.

    Raises:
        CalibrationError: unreadable source, or none to train on beside the held-out.
    """
    kept, held_out = [], []
    for source in sources:
        of_source = replace(config, source=source, fit=0)
        ids_nW = read_sequences(model, of_source, progress=progress, at_least=config.rerank + 1)
        held_out.append(ids_nW[: config.rerank])
        kept.append(ids_nW[config.rerank :])
        if len(kept[-1]) < config.search:
            say(f"{source} has {len(kept[-1])} sequences")
    if not kept:
        raise CalibrationError("no text to train on: name a source")
    data, rest = (Batch.cut(torch.cat(ids), config.prompt_tokens) for ids in (kept, held_out))
    return data, rest
