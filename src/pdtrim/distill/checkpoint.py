"""A training run on disk: its tensors, its settings and where it stands, in one file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from pdtrim.errors import PlanError
from pdtrim.keep.settings import Settings
from pdtrim.keep.tensors import load_kept, save_kept

SCHEMA = "pdtrim.distill/2"

Groups = Mapping[str, Mapping[str, Tensor]]
"""Tensors by group (``weight``, ``mean``, ``square``, ``best``) and ``layer.name``."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One evaluation.

    Attributes:
        step: updates before it.
        train_kl: mean over the steps since the last evaluation, nats a token; None at step 0.
        held_out_kl: nats a token.
        seconds: of training before it, over all resumes.
    """

    step: int
    train_kl: float | None
    held_out_kl: float
    seconds: float


@dataclass(kw_only=True)
class Position:
    """Where a run stands: its steps, time and evaluations, and the losses since the last one.

    The bounds are those of a file, which is written behind the first evaluation.
    """

    step: Annotated[int, Field(ge=0)]
    seconds: Annotated[float, Field(ge=0)]
    losses: list[float]
    history: Annotated[list[Point], Field(min_length=1)]


def save(path: Path, settings: Settings, position: Position, groups: Groups) -> None:
    """Write a run's state in one move.

    Args:
        settings: everything that decides the run's numbers.
    """
    tensors = {
        f"{group}/{key}": tensor
        for group, members in groups.items()
        for key, tensor in members.items()
    }
    save_kept(path, tensors, SCHEMA, settings, position)


def load(
    path: Path, settings: Settings, masters: Mapping[str, Tensor], best: torch.dtype
) -> tuple[Position, dict[str, dict[str, Tensor]]]:
    """Read a run's state, its tensors on the CPU.

    Args:
        masters: the weights that train, fp32: the file has to hold the like of each.
        best: type of the best weights.

    Raises:
        PdtrimError: not such a file, damaged, of a run of other settings, or of other tensors.
    """
    position, tensors = load_kept(path, SCHEMA, settings, Position)
    groups: dict[str, dict[str, Tensor]] = {"weight": {}, "mean": {}, "square": {}, "best": {}}
    types = {"weight": torch.float32, "best": best}
    if position.step:  # Adam has no averages before the first step
        types |= {"mean": torch.float32, "square": torch.float32}
    wanted = {f"{group}/{key}" for group in types for key in masters}
    strange = sorted(wanted ^ tensors.keys())
    for name in sorted(wanted & tensors.keys()):
        group, _, key = name.partition("/")
        tensor = groups[group][key] = tensors[name]
        if tensor.dtype != types[group] or tensor.shape != masters[key].shape:
            strange.append(name)
    if strange:
        raise PlanError(f"{path} does not fit this training: see '{strange[0]}'; delete it")
    return position, groups
