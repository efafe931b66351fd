"""The two checkpoints of a plan, ``DIR/prefill`` and ``DIR/decode``, and its dense model.

Both are written aside, in ``DIR/.pdtrim-TOKEN.new``, and put in place by renames. A kill leaves the
old pair, the new one, or one that is refused: a stage is missing, or the two name different pairs.
The next export into the folder first puts the old pair back.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch

from pdtrim import card
from pdtrim.errors import PdtrimError, PlanError
from pdtrim.keep.files import cannot_write, sync_file, sync_folder, write_text
from pdtrim.keep.folder import LOCK
from pdtrim.keep.lock import lock
from pdtrim.models.checkpoint import (
    CONFIG,
    file_names,
    load_stage,
    read_stage,
    save_stage,
    seal,
)
from pdtrim.models.loading import load_model
from pdtrim.models.model import Model
from pdtrim.plan import MAX_PLAN_BYTES, STAGES, PrunePlan, Stage
from pdtrim.reading.json_text import read_json
from pdtrim.stage.forward import Pair

ASIDE = re.compile(r"\.pdtrim-[0-9a-f]{16}\.(new|old|gone)")


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
    for key in ("family", "num_layers", "num_kv_heads", "head_dim"):
        own, stated = getattr(model.ref, key), getattr(plan.model, key)
        if own != stated:
            raise PlanError(f"the plan was altered: it says {key} {stated}, the model has {own}")


def write_pair(pair: Pair, plan: PrunePlan, folder: Path) -> Path:
    """Write the checkpoints of both stages below ``folder`` and return it.

    A folder that holds something else is left alone; a pair that is there is replaced as a whole,
    and other files beside its stages stay.

    Args:
        pair: what the stages run, with all of the dense model's layers.

    Raises:
        PlanError: a folder that is in use.
        PdtrimError: another run writes to the folder, or the system refuses to write.
    """
    _check_place(folder)
    check_kv_biases(pair, plan)
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / LOCK, str(folder)):
            _write(pair, plan, folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        if new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
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
    _, plan = read_pair(folder)
    prefill, _ = load_stage(folder / "prefill", "prefill", device=device)
    decode, _ = load_stage(folder / "decode", "decode", device=device)
    return Pair(prefill=prefill, decode=decode), plan


def plan_of(folder: str | Path) -> PrunePlan:
    """The plan inside an exported pair.

    Raises:
        ModelError: not such a folder, or an altered one.
        PlanError: the plan inside is invalid, or the stages are of two exports.
    """
    return read_pair(Path(folder))[1]


def read_pair(folder: Path) -> tuple[dict[Stage, dict[str, Any]], PrunePlan]:
    """The configs of both checkpoints of an export, and their plan; the weights are not read.

    Raises:
        ModelError: a checkpoint is missing or altered.
        PlanError: the two were not made by one export.
    """
    found = {stage: read_stage(folder / stage, stage) for stage in STAGES}
    prefill, decode = found["prefill"], found["decode"]
    check_pair(prefill.plan.digest, decode.plan.digest)
    if prefill.entry.pair != decode.entry.pair:
        raise PlanError(
            f"{folder} holds the stages of two exports, one of which was interrupted: export again"
        )
    return {stage: config.data for stage, config in found.items()}, prefill.plan


def longest_of(config: dict[str, Any]) -> int:
    """Tokens of the longest sequence of a checkpoint; a million where its config does not say."""
    return int(config.get("max_position_embeddings") or 1 << 20)


def check_pair(prefill: str, decode: str) -> None:
    """Raise PlanError unless the digests agree."""
    if prefill != decode:
        raise PlanError(
            f"prefill and decode come from different plans ({prefill[:12]} and {decode[:12]}):"
            " export both from one plan"
        )


def _check_place(folder: Path) -> None:
    """Raise PlanError unless the folder is new, empty, or holds a pair of ours."""
    if folder.exists() and not folder.is_dir():
        raise PlanError(f"{folder} is a file: give a folder")
    names = [] if not folder.exists() else sorted(path.name for path in folder.iterdir())
    stages = [name for name in names if name in STAGES]
    others = [n for n in names if n not in STAGES and n != LOCK and not ASIDE.fullmatch(n)]
    others = [n for n in others if n != card.NAME or not card.is_card(folder / n)]
    foreign = [stage for stage in stages if _entry(folder / stage) is None]
    if foreign or (others and not stages):
        raise PlanError(
            f"{folder} already holds '{(foreign or others)[0]}': give a new or an empty folder"
        )


def _entry(folder: Path) -> dict[str, Any] | None:
    """pdtrim's entry in the config of a stage's folder; None if it is not one of ours."""
    if folder.is_symlink() or not (folder / CONFIG).is_file():
        return None
    try:
        data = read_json(folder / CONFIG, limit=2 * MAX_PLAN_BYTES)
    except PdtrimError:
        return None
    entry = data.get("pdtrim") if isinstance(data, dict) else None
    return entry if isinstance(entry, dict) else None


def _write(pair: Pair, plan: PrunePlan, folder: Path) -> None:
    _recover(folder)
    aside = folder / f".pdtrim-{secrets.token_hex(8)}.new"
    try:
        save_stage(pair.prefill, plan, "prefill", aside / "prefill")
        save_stage(pair.decode, plan, "decode", aside / "decode")
        seal({stage: aside / stage for stage in STAGES})
        for path in aside.rglob("*"):
            (sync_folder if path.is_dir() else sync_file)(path)
        for stage in STAGES:
            _check_known(folder / stage, file_names(aside / stage))
        _swap(folder, aside)
        place = folder / card.NAME
        if card.is_card(place) or not place.exists():  # a user's own stays
            write_text(place, card.card_of(plan, pair.decode.licence))
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _check_known(stage: Path, names: set[str]) -> None:
    """Raise PlanError if a stage's folder, which is to be replaced, holds files of somebody else's.

    Args:
        names: of files that the new checkpoint has too.
    """
    entry = _entry(stage) or {}
    files = entry.get("files")
    known = names | set(files if isinstance(files, dict) else ())
    strange = sorted(file_names(stage) - known)
    if strange:
        raise PlanError(f"{stage} holds '{strange[0]}', which export did not write: move it away")


def _swap(folder: Path, aside: Path) -> None:
    """Put the stages in ``aside`` into their places; undone if that fails."""
    old = aside.with_suffix(".old")
    old.mkdir()
    moved: list[tuple[Path, Path]] = []
    try:
        for stage in STAGES:
            for source, target in ((folder / stage, old / stage), (aside / stage, folder / stage)):
                if source.exists():
                    os.rename(source, target)
                    moved.append((source, target))
        sync_folder(folder)
    except BaseException:
        for source, target in reversed(moved):
            os.rename(target, source)
        old.rmdir()
        raise
    gone = aside.with_suffix(".gone")
    os.rename(old, gone)  # from here on the new pair counts
    shutil.rmtree(gone, ignore_errors=True)


def _recover(folder: Path) -> None:
    """Put back the pair of an export that was killed between its renames; remove what it wrote."""
    for path in sorted(folder.iterdir()):
        found = ASIDE.fullmatch(path.name)
        if found is None or path.is_symlink() or not path.is_dir():
            continue
        if found[1] == "old":
            aside = path.with_suffix(".new")
            aside.mkdir(exist_ok=True)
            for stage in STAGES:
                if (path / stage).exists():
                    if (folder / stage).exists():
                        os.rename(folder / stage, aside / stage)
                    os.rename(path / stage, folder / stage)
            path.rmdir()
    for path in list(folder.iterdir()):
        if ASIDE.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
