"""Tensors kept with their settings and a state: one safetensors file, its header holding the rest.

One file, because two could not be replaced at once: a kill leaves the old one or the new one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pdtrim.errors import PdtrimError
from pdtrim.keep.files import cannot_write, whole
from pdtrim.keep.settings import Settings, check_same, plain
from pdtrim.records import first_problem

T = TypeVar("T")

ENTRY = "pdtrim"


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file whole or not at all.

    Raises:
        CannotWrite: the system refuses to write; what was there is as it was.
    """
    data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole(path) as part:
        try:
            save_file(data, part, metadata=metadata)
        except SafetensorError as error:
            raise cannot_write(path, error) from error


def save_kept(
    path: Path, tensors: Mapping[str, Tensor], schema: str, settings: Settings, state: Any
) -> None:
    """Write tensors, the settings that they were made by, and what else belongs to them.

    Args:
        schema: of the file, such as ``pdtrim.text/1``.
        state: a record or a dataclass.

    Raises:
        CannotWrite: as :func:`write_tensors`.
    """
    about = {
        "schema": schema,
        "settings": plain(settings),
        "state": TypeAdapter(type(state)).dump_python(state, mode="json"),
    }
    about["sha256"] = _digest(about, tensors)
    write_tensors(path, tensors, {ENTRY: json.dumps(about)})


def load_kept(
    path: Path, schema: str, settings: Settings, kind: type[T]
) -> tuple[T, dict[str, Tensor]]:
    """Read what :func:`save_kept` wrote by the same settings; tensors on the CPU.

    Args:
        kind: of the state.

    Raises:
        PdtrimError: it was made by other settings, is damaged, or is no such file.
    """
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get(ENTRY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        text = str(error).splitlines()[0]
        raise PdtrimError(f"cannot read {path}: {text}; delete it to start anew") from error
    if not isinstance(about, dict) or about.get("schema") != schema:
        raise PdtrimError(f"{path} is not a file of schema '{schema}': delete it, or move it away")
    digest = about.pop("sha256", None)
    if not isinstance(about.get("settings"), dict) or digest != _digest(about, tensors):
        raise PdtrimError(f"{path} is damaged: delete it to start anew")
    check_same(path, about["settings"], settings)
    try:
        return TypeAdapter(kind).validate_python(about.get("state")), tensors
    except ValidationError as error:
        raise PdtrimError(f"{path}: {first_problem(error)}; delete it to start anew") from error


def ids_digest(*ids: Tensor) -> str:
    """SHA-256 (hex) of token ids, their shapes included."""
    digest = hashlib.sha256()
    for part in ids:
        digest.update(repr(tuple(part.shape)).encode())
        digest.update(_bytes(part.long()))
    return digest.hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of tensors by name, their types and shapes included."""
    return _digest({}, tensors)


def _digest(about: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
