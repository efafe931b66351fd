"""The two checkpoints of a plan, ``DIR/prefill`` and ``DIR/decode``, and its dense model."""

from __future__ import annotations

from pathlib import Path

import torch

from pdtrim.errors import PlanError
from pdtrim.models.checkpoint import load_stage, read_stage_config, save_stage
from pdtrim.models.loading import load_model
from pdtrim.models.model import Model
from pdtrim.plan import STAGES, PrunePlan
from pdtrim.stage.forward import Pair


def base_model(
    plan: PrunePlan, *, source: str | None = None, dtype: str = "bfloat16", device: str = "cpu"
) -> Model:
    """Load the dense model of a plan.

    Args:
        source: where to read it instead of the name in the plan.

    Raises:
        PlanError: it is not the model that the plan was made for.
    """
    name = source or plan.model.name
    model = load_model(
        name, dtype=dtype, device=device, revision=plan.model.revision if source is None else None
    )
    check_base(model, plan)
    return model


def check_base(model: Model, plan: PrunePlan) -> None:
    """Raise PlanError unless the model is the plan's."""
    if model.fingerprint != plan.model.fingerprint:
        raise PlanError(
            f"'{model.name}' is not the model of this plan: fingerprint"
            f" {model.fingerprint[:12]}, the plan has {plan.model.fingerprint[:12]}"
        )


def write_pair(pair: Pair, plan: PrunePlan, folder: Path) -> Path:
    """Write the checkpoints of both stages below ``folder`` and return it.

    A folder that holds something else is left alone.

    Args:
        pair: what the stages run, with all of the dense model's layers.

    Raises:
        PlanError: a folder that is in use.
    """
    if folder.exists() and not folder.is_dir():
        raise PlanError(f"{folder} is a file: give a folder")
    if folder.is_dir():
        others = sorted(p.name for p in folder.iterdir() if p.name not in STAGES)
        foreign = [s for s in STAGES if (folder / s).exists() and not _ours(folder / s)]
        if others or foreign:
            raise PlanError(
                f"{folder} already holds '{(others + foreign)[0]}': give an empty folder"
            )
    check_kv_biases(pair, plan)
    save_stage(pair.prefill, plan, "prefill", folder / "prefill")
    save_stage(pair.decode, plan, "decode", folder / "decode")
    return folder


def check_kv_biases(pair: Pair, plan: PrunePlan) -> None:
    """Refuse stages whose key or value biases differ where a codec leaves them out.

    Raises:
        PlanError: naming the first such layer.
    """
    for layer in plan.sent_layers:
        if plan.kv[layer].codec.exact or pair.prefill is pair.decode:
            continue
        ours, theirs = (m.block(layer).kv_bias() for m in (pair.prefill, pair.decode))
        if ours is None or theirs is None:
            continue
        places = list(plan.sent_places(layer))
        same = torch.equal(ours.k_GD[places], theirs.k_GD)
        if not (same and torch.equal(ours.v_GD[places], theirs.v_GD)):
            raise PlanError(
                f"layer {layer}: the stages' key and value biases differ, which its codec leaves"
                " out: replace weights without these biases, or send the layer raw"
            )


def load_pair(folder: str | Path, *, device: str = "cpu") -> tuple[Pair, PrunePlan]:
    """Both checkpoints of an export, for the simulator.

    Raises:
        PlanError: the two were not exported from one plan.
    """
    folder = Path(folder)
    prefill, plan = load_stage(folder / "prefill", "prefill", device=device)
    decode, other = load_stage(folder / "decode", "decode", device=device)
    check_pair(plan.digest, other.digest)
    return Pair(prefill=prefill, decode=decode), plan


def plan_of(folder: str | Path) -> PrunePlan:
    """The plan inside an exported pair.

    Raises:
        ModelError: not such a folder.
        PlanError: the plan inside is invalid.
    """
    return read_stage_config(Path(folder) / "decode", "decode")[1]


def check_pair(prefill: str, decode: str) -> None:
    """Raise PlanError unless the digests agree."""
    if prefill != decode:
        raise PlanError(
            f"prefill and decode come from different plans ({prefill[:12]} and {decode[:12]}):"
            " export both from one plan"
        )


def _ours(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and '"pdtrim"' in config.read_text(encoding="utf-8", errors="replace")
