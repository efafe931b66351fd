"""Text of several sources in one batch, for training: it takes more than one file often has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from pdtrim.calibration.batches import CalibrationConfig, pack
from pdtrim.calibration.self_text import write_text
from pdtrim.calibration.sources import read_documents
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
        ids_nW = _read(model, replace(config, source=source, fit=0), progress)
        held_out.append(ids_nW[: config.rerank])
        kept.append(ids_nW[config.rerank :])
        if len(kept[-1]) < config.search:
            say(f"{source} has {len(kept[-1])} sequences")
    if not kept:
        raise CalibrationError("no text to train on: name a source")
    P = config.prompt_tokens
    data, rest = torch.cat(kept), torch.cat(held_out)
    return (
        Batch(prompt_BP=data[:, :P], continuation_BC=data[:, P:]),
        Batch(prompt_BP=rest[:, :P], continuation_BC=rest[:, P:]),
    )


def _read(model: Model, config: CalibrationConfig, progress: Progress) -> torch.Tensor:
    width = config.prompt_tokens + config.continuation_tokens
    if config.source == "self":
        return write_text(
            model, sequences=config.sequences, tokens=width, seed=config.seed, progress=progress
        )
    return pack(
        model,
        read_documents(config.source),
        sequences=config.sequences,
        width=width,
        seed=config.seed,
        at_least=config.rerank + 1,
    )
