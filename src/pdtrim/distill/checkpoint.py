"""A training run on disk: one safetensors file, its header holding what is not a tensor as JSON.

One file, because two could not be replaced at once: a kill leaves the old state or the new one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pdtrim.errors import PlanError

SCHEMA = "pdtrim.distill/1"

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
    """Where a run stands: its steps, time and evaluations, and the losses since the last one."""

    step: int
    seconds: float
    losses: list[float]
    history: list[Point]


def save(path: Path, run: str, position: Position, groups: Groups) -> None:
    """Write a run's state in one move.

    Args:
        run: hash of everything that decides the run's numbers.
    """
    state = {"schema": SCHEMA, "run": run, **asdict(position)}
    tensors = {
        f"{group}/{key}": tensor.contiguous()
        for group, members in groups.items()
        for key, tensor in members.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    save_file(tensors, part, metadata={"state": json.dumps(state)})
    os.replace(part, path)


def load(path: Path, run: str) -> tuple[Position, dict[str, dict[str, Tensor]]]:
    """Read a run's state, its tensors on the CPU.

    Raises:
        PlanError: not such a file, or of another run.
    """
    try:
        with safe_open(path, "pt") as file:
            state = json.loads((file.metadata() or {}).get("state", "{}"))
            if not isinstance(state, dict) or state.get("schema") != SCHEMA:
                raise PlanError(f"{path} is not a training checkpoint of schema '{SCHEMA}'")
            if state["run"] != run:
                raise PlanError(
                    f"{path} is of another run: the model, gates, KV policy, text or settings"
                    " differ; remove it or name another file"
                )
            groups: dict[str, dict[str, Tensor]] = {}
            for name in file.keys():  # noqa: SIM118 (safe_open is no dict)
                group, _, key = name.partition("/")
                groups.setdefault(group, {})[key] = file.get_tensor(name)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise PlanError(f"cannot read the training checkpoint {path}: {error}") from error
    position = Position(
        step=state["step"],
        seconds=state["seconds"],
        losses=state["losses"],
        history=[Point(**point) for point in state["history"]],
    )
    return position, groups
