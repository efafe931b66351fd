"""Write and read a plan's replaced blocks: one safetensors file a stage and layer.

The files lie below the plan's folder, ``NAME/decode-07.safetensors``. The plan holds the path and
the SHA-256 of each, so its digest covers the weights. A plan may come from anywhere: before a file
is read its place and size are checked, and before it is parsed its hash. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pdtrim.errors import PlanError
from pdtrim.models.model import Model
from pdtrim.models.narrow import outline
from pdtrim.models.replace import Weights
from pdtrim.plan import PrunePlan, Replacement, Stage

HEADER_BYTES = 2**16
"""Room for the names and shapes of one block's parameters in a safetensors header."""


def save_blocks(
    blocks: Mapping[Stage, Mapping[int, Weights]],
    merged: Mapping[tuple[Stage, int], tuple[int, ...]],
    folder: Path,
    name: str,
) -> tuple[Replacement, ...]:
    """Write replaced blocks below ``folder / name``; returns the plan's entries for them.

    Args:
        blocks: by stage and dense layer index, the parameters that differ from the dense model's.
        merged: the layers that a block stands for; itself alone where it is not named.
        folder: where the plan file goes.
        name: of a folder in it, such as ``plan.blocks``.

    Raises:
        PlanError: ``name`` is not the name of one folder.
    """
    if Path(name).name != name or name in ("", ".."):
        raise PlanError(f"'{name}' is not a folder name: give one without '/'")
    made = []
    for stage, of_stage in blocks.items():
        for layer, weights in sorted(of_stage.items()):
            data = save({key: part.detach().cpu().contiguous() for key, part in weights.items()})
            path = f"{name}/{stage}-{layer:02d}.safetensors"
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
            made.append(
                Replacement(
                    stage=stage,
                    layer=layer,
                    merged=merged.get((stage, layer), (layer,)),
                    weights=path,
                    sha256=hashlib.sha256(data).hexdigest(),
                )
            )
    return tuple(made)


def load_blocks(plan: PrunePlan, model: Model, folder: Path) -> dict[Stage, dict[int, Weights]]:
    """Read a plan's replaced blocks, by stage and dense layer index.

    Args:
        model: the plan's dense model; with the plan's widths it says what parameters a block
            can have.
        folder: the plan file's.

    Raises:
        PlanError: a file that is missing, outside the folder, too large, altered, or no block.
    """
    blocks: dict[Stage, dict[int, Weights]] = {"prefill": {}, "decode": {}}
    for item in plan.replacements:
        block = outline(model, item.layer, plan.width(item.stage, item.layer))
        blocks[item.stage][item.layer] = _read(item, dict(block.named_parameters()), model, folder)
    return blocks


def _read(item: Replacement, expected: Mapping[str, Tensor], model: Model, folder: Path) -> Weights:
    largest = HEADER_BYTES + sum(4 * part.numel() for part in expected.values())
    try:
        data = _bytes(folder, item.weights, largest)
    except (OSError, ValueError) as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError(f"cannot read '{item.weights}' in {folder}: {error}") from error
    if hashlib.sha256(data).hexdigest() != item.sha256:
        raise PlanError(f"'{item.weights}' is not the file of this plan: its SHA-256 differs")
    try:
        weights: Weights = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise PlanError(f"'{item.weights}' is no safetensors file: {error}") from error
    for name, part in weights.items():
        fits = name in expected and part.shape == expected[name].shape
        if not fits or not part.is_floating_point():
            raise PlanError(
                f"'{item.weights}' does not fit layer {item.layer} of '{model.name}':"
                f" see '{name}', {part.dtype} {tuple(part.shape)}"
            )
    return weights


def _bytes(folder: Path, name: str, largest: int) -> bytes:
    path = (folder / name).resolve()  # a link may lead anywhere
    if not path.is_relative_to(folder.resolve()):
        raise PlanError(f"'{name}' leads out of the plan's folder {folder}")
    if not path.is_file():
        raise PlanError(f"no file '{name}' in {folder}: the plan's replaced block is gone")
    if path.stat().st_size > largest:
        raise PlanError(f"'{name}' is larger than a block of this model can be")
    with path.open("rb") as file:
        return file.read(largest)
