"""Write and read a plan's replaced blocks: one safetensors file a stage and layer.

Until a plan is saved its files are in memory; then they lie below the plan's folder,
``NAME/decode-07-0123456789ab.safetensors``, the last part being the begin of the file's SHA-256: a
new plan's files never replace those of the old one, which stays whole until the new plan file is in
its place. The plan holds the path and the SHA-256 of each, so its digest covers the weights. A plan
may come from anywhere: before a file is read its place and size are checked, and before it is
parsed its hash. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Protocol

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pdtrim.errors import PdtrimError, PlanError
from pdtrim.finite import finite
from pdtrim.keep.files import sha256_of, write_bytes
from pdtrim.models.model import Model
from pdtrim.models.narrow import outline
from pdtrim.models.swap import Blocks, Weights
from pdtrim.plan import PrunePlan, Replacement, Stage

FILE_NAME = re.compile(r"(prefill|decode)-\d+(-[0-9a-f]{12})?\.safetensors")
HEADER_BYTES = 2**16
"""Room for the names and shapes of one block's parameters in a safetensors header."""
MAX_BLOCK_BYTES = 2**34
"""The largest file that is copied where no model says how large a block can be."""


class BlockFiles(Protocol):
    """Where the bytes of replaced blocks are, by the name that the plan gives them."""

    def read(self, name: str, largest: int) -> bytes:
        """One file, at most ``largest`` bytes long.

        Raises:
            PlanError: it is not there, too large, or not below the plan's folder.
        """


@dataclass(frozen=True, kw_only=True)
class FilesInMemory:
    """Files that have not been written yet."""

    files: Mapping[str, bytes] = field(default_factory=dict)

    def read(self, name: str, largest: int) -> bytes:
        """See :class:`BlockFiles`."""
        if name not in self.files:
            raise PlanError(
                f"the weights '{name}' of this plan are in a file: open the plan file itself"
            )
        del largest  # it is in memory already
        return self.files[name]


@dataclass(frozen=True, kw_only=True)
class FilesInFolder:
    """Files below a plan file's folder."""

    folder: Path

    def read(self, name: str, largest: int) -> bytes:
        """See :class:`BlockFiles`."""
        try:
            return _bytes(self.folder, name, largest)
        except (OSError, ValueError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"cannot read '{name}' in {self.folder}: {error}") from error


def encode_blocks(
    blocks: Blocks, merged: Mapping[tuple[Stage, int], tuple[int, ...]]
) -> tuple[tuple[Replacement, ...], dict[str, bytes]]:
    """A plan's entries for replaced blocks, and their files by name.

    Args:
        blocks: the parameters that differ from the dense model's.
        merged: the layers that a block stands for; itself alone where it is not named.

    Raises:
        NotFinite: a parameter is NaN or infinite.
    """
    entries, files = [], {}
    for stage, of_stage in blocks.items():
        for layer, weights in sorted(of_stage.items()):
            for key, part in weights.items():
                finite(part, f"'{key}' of the replaced block {layer} of {stage}")
            data = save({key: part.detach().cpu().contiguous() for key, part in weights.items()})
            name = f"{stage}-{layer:02d}.safetensors"
            files[name] = data
            entries.append(
                Replacement(
                    stage=stage,
                    layer=layer,
                    merged=merged.get((stage, layer), (layer,)),
                    weights=name,
                    sha256=hashlib.sha256(data).hexdigest(),
                )
            )
    return tuple(entries), files


def save_blocks(plan: PrunePlan, files: BlockFiles, folder: Path, name: str) -> PrunePlan:
    """Write a plan's replaced blocks below ``folder / name``; returns the plan that names them.

    Args:
        files: where the blocks are now.
        folder: where the plan file goes.
        name: of a folder in it, such as ``plan.blocks``.

    Raises:
        PlanError: ``name`` is not the name of one folder, or a block that is missing or altered.
    """
    if Path(name).name != name or name in ("", ".."):
        raise PlanError(f"'{name}' is not a folder name: give one without '/'")
    entries = []
    for item in plan.replacements:
        data = _checked(item, files, MAX_BLOCK_BYTES)
        place = f"{name}/{item.stage}-{item.layer:02d}-{item.sha256[:12]}.safetensors"
        if not _is_written(folder / place, item.sha256):
            write_bytes(folder / place, data)
        entries.append(item.model_copy(update={"weights": place}))
    return plan.model_copy(update={"replacements": tuple(entries)})


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


def load_blocks(plan: PrunePlan, model: Model, files: BlockFiles) -> Blocks:
    """Read a plan's replaced blocks, by stage and dense layer index.

    Args:
        model: the plan's dense model; with the plan's widths it says what parameters a block
            can have.

    Raises:
        PlanError: a file that is missing, outside the folder, too large, altered, or no block.
    """
    blocks: Blocks = {"prefill": {}, "decode": {}}
    for item in plan.replacements:
        block = outline(model, item.layer, plan.width(item.stage, item.layer))
        blocks[item.stage][item.layer] = _read(item, dict(block.named_parameters()), model, files)
    return blocks


def _checked(item: Replacement, files: BlockFiles, largest: int) -> bytes:
    data = files.read(item.weights, largest)
    if hashlib.sha256(data).hexdigest() != item.sha256:
        raise PlanError(f"'{item.weights}' is not the file of this plan: its SHA-256 differs")
    return data


def _read(
    item: Replacement, expected: Mapping[str, Tensor], model: Model, files: BlockFiles
) -> Weights:
    largest = HEADER_BYTES + sum(4 * part.numel() for part in expected.values())
    data = _checked(item, files, largest)
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
