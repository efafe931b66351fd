"""Write and read a plan's replaced blocks: one safetensors file a stage and layer.

The files lie below the plan's folder, ``NAME/decode-07-0123456789ab.safetensors``, the last part
being the begin of the file's SHA-256: a new plan's files never replace those of the old one, which
stays whole until the new plan file is in its place. The plan holds the path and the SHA-256 of
each, so its digest covers the weights. A plan may come from anywhere: before a file is read its
place and size are checked, and before it is parsed its hash. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pdtrim.errors import PdtrimError, PlanError
from pdtrim.keep.files import sha256_of, write_bytes
from pdtrim.models.model import Model
from pdtrim.models.narrow import outline
from pdtrim.models.replace import Weights
from pdtrim.plan import PrunePlan, Replacement, Stage

FILE_NAME = re.compile(r"(prefill|decode)-\d+(-[0-9a-f]{12})?\.safetensors")
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
        PdtrimError: the system refuses to write.
    """
    if Path(name).name != name or name in ("", ".."):
        raise PlanError(f"'{name}' is not a folder name: give one without '/'")
    made = []
    for stage, of_stage in blocks.items():
        for layer, weights in sorted(of_stage.items()):
            data = save({key: part.detach().cpu().contiguous() for key, part in weights.items()})
            digest = hashlib.sha256(data).hexdigest()
            path = f"{name}/{stage}-{layer:02d}-{digest[:12]}.safetensors"
            if not _is_written(folder / path, digest):
                write_bytes(folder / path, data)
            made.append(
                Replacement(
                    stage=stage,
                    layer=layer,
                    merged=merged.get((stage, layer), (layer,)),
                    weights=path,
                    sha256=digest,
                )
            )
    return tuple(made)


def save_with_blocks(
    plan: PrunePlan,
    blocks: Mapping[Stage, Mapping[int, Weights]],
    merged: Mapping[tuple[Stage, int], tuple[int, ...]],
    path: Path,
) -> PrunePlan:
    """Write a plan file and, in a folder beside it, its replaced blocks; returns that plan.

    The old plan and its blocks stay as they are until the new ones are there.

    Args:
        plan: its replacements are left out for those of ``blocks``.

    Raises:
        PdtrimError: as :func:`save_blocks`, or the plan is not valid.
    """
    name = f"{path.stem}.blocks"
    with replacing(path, name):
        entries = save_blocks(blocks, merged, path.parent, name)
        made = plan.model_copy(update={"replacements": entries})
        made = PrunePlan.from_json(made.to_json(), source=str(path))
        made.save(path)
    return made


@contextlib.contextmanager
def replacing(path: Path, name: str) -> Iterator[None]:
    """Within it a plan file is replaced; afterwards block files go that the old plan named and no
    plan in its folder, ``*.json``, names now.

    If it fails, the block files that were added in it go instead.

    Args:
        path: of the plan file.
        name: of the folder of its blocks.
    """
    before = _named(path, name)
    there = set(_block_files(path.parent / name))
    try:
        yield
    except BaseException:
        _remove(set(_block_files(path.parent / name)) - there, path.parent / name)
        raise
    now = (_named(other, name) for other in path.parent.glob("*.json"))
    _remove(before.difference(*now), path.parent / name)


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


def _is_written(path: Path, digest: str) -> bool:
    return path.is_file() and sha256_of(path) == digest


def _named(path: Path, name: str) -> set[Path]:
    """Files in the folder ``name`` that the plan file at ``path`` names; none without a plan."""
    try:
        plan = PrunePlan.load(path)
    except PdtrimError:
        return set()
    named = (PurePosixPath(item.weights) for item in plan.replacements)
    ours = (p for p in named if p.parent.as_posix() == name and FILE_NAME.fullmatch(p.name))
    return {path.parent / place for place in ours}


def _block_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if FILE_NAME.fullmatch(path.name)]


def _remove(files: Iterable[Path], folder: Path) -> None:
    for path in files:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it is not empty, or not there
        folder.rmdir()


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
