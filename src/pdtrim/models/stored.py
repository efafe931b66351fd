"""What a safetensors folder holds, looked at before any weight is read.

transformers fills what is missing with random numbers, leaves out what it does not know, and takes
packed numbers for weights. So names, shapes and stored types are held against the architecture
first, from the headers alone: nothing is allocated for a folder that is refused.
Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdtrim.errors import ModelError
from pdtrim.reading.json_text import parse_json, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PLAIN_TYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Stored types that are weights as they stand, and their bytes a number."""
MAX_HEADER = 100_000_000
"""Bytes of a header; the format's own limit."""
POINTER = b"version https://git-lfs"
HARMLESS = re.compile(r"(rotary_emb\.inv_freq|\.masked_bias|\.attn\.bias)$")
"""Buffers of older checkpoints, which are computed and not learnt."""
PREFIXES = ("module.", "_orig_mod.", "base_model.model.", "model.language_model.", "transformer.")
"""What training wrappers put before every name."""
NAMED = 3
"""So many names stand in an error."""
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor's stored type and shape."""

    kind: str
    shape: tuple[int, ...]


def not_a_pointer(path: Path) -> None:
    """Refuse a Git LFS pointer, which stands where a large file was not downloaded.

    Raises:
        ModelError: it is one.
    """
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise ModelError(f"{path} is a Git LFS pointer, not the file: run 'git lfs pull' there")


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's ``config.json``, if it describes weights that are read as they stand.

    Raises:
        ModelError: no config of a model, quantised weights, or an adapter.
    """
    path = folder / "config.json"
    not_a_pointer(path)
    data = read_json(path, kind=ModelError)
    if not isinstance(data, dict) or not isinstance(data.get("model_type"), str):
        raise ModelError(f"{path} names no 'model_type': it is not the config of a model")
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder} holds an adapter: merge the adapter into its base model first")
    about = data.get("quantization_config") or data.get("compression_config")
    if (folder / "hf_quant_config.json").exists():
        about = about or {"quant_method": "modelopt"}
    if about:
        method = about.get("quant_method", "unknown") if isinstance(about, dict) else "unknown"
        raise ModelError(
            f"{folder} is quantised by '{method}': pdtrim reads plain weights and GGUF; give the"
            " model that was quantised"
        )
    return data


def read_headers(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder by name.

    Raises:
        ModelError: weights that are missing, cut short, damaged, or stored in a type that is not
            read.
    """
    names = _weight_files(folder)
    stored: dict[str, Stored] = {}
    for name, wanted in names.items():
        found = _header(folder / name)
        absent = sorted(set(wanted) - set(found))
        if absent:
            raise ModelError(f"{folder / name} lacks {_few(absent)}, which the index says it holds")
        stored |= found
    odd = sorted(name for name, tensor in stored.items() if tensor.kind not in PLAIN_TYPES)
    if odd:
        raise ModelError(
            f"{folder} stores {_few(odd)} as {stored[odd[0]].kind}: quantised or packed weights"
            f" are not read, only {', '.join(PLAIN_TYPES)}; give the model that was quantised"
        )
    return stored


def _weight_files(folder: Path) -> dict[str, list[str]]:
    """Files that hold the weights, with the tensors that the index says each has."""
    if (folder / SINGLE).is_file():
        return {SINGLE: []}
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX, kind=ModelError)
        places = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(places, dict) or not places:
            raise ModelError(f"{folder / INDEX} has no 'weight_map': it is damaged")
        files: dict[str, list[str]] = {}
        for tensor, name in places.items():
            if not isinstance(name, str) or Path(name).name != name:
                raise ModelError(f"{folder / INDEX} names a file outside of the folder: {name!r}")
            files.setdefault(name, []).append(tensor)
        for name in files:
            if not (folder / name).is_file():
                raise ModelError(f"{folder} lacks '{name}', which its index names: download it")
        return files
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise ModelError(
            f"{folder} holds only pickle weights, which can run code: pdtrim reads safetensors and"
            " GGUF only"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    what = f"no '{SINGLE}', only '{others[0]}'" if others else "no weights"
    raise ModelError(f"{folder} holds {what}: pdtrim reads safetensors and GGUF only")


def _header(path: Path) -> dict[str, Stored]:
    not_a_pointer(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise ModelError(f"{path} is no safetensors file, or cut short: download it again")
        data = parse_json(file.read(length), where=f"the header of {path}", kind=ModelError)
    if not isinstance(data, dict):
        raise ModelError(f"{path} is no safetensors file: its header is no object")
    data.pop("__metadata__", None)
    stored, end = {}, 0
    for name, entry in data.items():
        try:
            begin, stop = entry["data_offsets"]
            shape = tuple(entry["shape"])
            kind = str(entry["dtype"])
            sound = all(isinstance(n, int) and n >= 0 for n in (begin, stop, *shape))
            exact = kind not in PLAIN_TYPES or stop - begin == PLAIN_TYPES[kind] * math.prod(shape)
        except (KeyError, TypeError, ValueError):
            sound = exact = False
        if not (sound and exact):
            raise ModelError(f"the header of {path} is damaged: see '{name[:80]}'")
        stored[name] = Stored(kind=kind, shape=shape)
        end = max(end, stop)
    if size != 8 + length + end:
        raise ModelError(
            f"{path} has {size:,} bytes but should have {8 + length + end:,}: download it again"
        )
    return stored


def check_names(expected: Shapes, stored: Mapping[str, Stored], where: str, *, tied: bool) -> None:
    """Hold what is stored against what the architecture needs.

    Args:
        expected: the architecture's parameters.
        tied: the head is the embedding, so that it need not be stored.

    Raises:
        ModelError: naming the first few tensors that are missing, too many, or of another shape.
    """
    # a checkpoint of the bare decoder lacks this prefix, which transformers adds
    bare = any(name.startswith(("layers.", "embed_tokens.")) for name in stored)
    shapes = {f"model.{n}" if bare and n != "lm_head.weight" else n: s for n, s in stored.items()}
    head = {"lm_head.weight"} if tied else set()
    missing = [name for name in expected if name not in shapes and name not in head]
    unexpected = [name for name in shapes if name not in expected]
    odd = [n for n, s in shapes.items() if n in expected and s.shape != tuple(expected[n])]
    refuse_differences(missing, [n for n in unexpected if n not in head], where)
    if odd:
        name = sorted(odd)[0]
        raise ModelError(
            f"{where}: '{name}' is {shapes[name].shape}, but its config makes it"
            f" {tuple(expected[name])}: the config and the weights are of different models"
        )


def refuse_differences(missing: Iterable[str], unexpected: Iterable[str], where: str) -> None:
    """Refuse a checkpoint whose tensors are not those of its architecture.

    Raises:
        ModelError: naming the first few.
    """
    missing = sorted(missing)
    unexpected = sorted(name for name in unexpected if not HARMLESS.search(name))
    prefix = next((p for p in PREFIXES if any(n.startswith(p) for n in unexpected)), None)
    if missing and prefix and len(unexpected) >= len(missing):
        raise ModelError(
            f"{where}: its tensors' names begin with '{prefix}', such as '{unexpected[0]}': save"
            " the model without the wrapper that added it"
        )
    if missing:
        raise ModelError(
            f"{where} lacks the weights {_few(missing)}: they would be random numbers; is the"
            " download or the config's number of layers wrong?"
        )
    if unexpected:
        raise ModelError(
            f"{where} holds weights that its architecture does not have, {_few(unexpected)}: they"
            " would be left out"
        )


def _few(names: list[str]) -> str:
    shown = ", ".join(f"'{name[:120]}'" for name in names[:NAMED])
    return shown if len(names) <= NAMED else f"{shown} and {len(names) - NAMED} more"
