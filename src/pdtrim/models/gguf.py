"""What a GGUF file says about itself, read before any library allocates for it.

Every count and length is held against the file's size first. Besides the plain facts, the header
says what transformers' reader does not ask: whether the file is one of several, which tensors it
has, and how RoPE is scaled. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pdtrim.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {
    **{0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"},
    **{10: "Q", 11: "q", 12: "d"},
}
STRING, ARRAY = 8, 9
HEADS = "attention.head_count"
FREQUENCIES = "rope_freqs.weight"
"""Factors that RoPE's frequencies are divided by."""
MAX_STRING = 16 * 2**20
MAX_ENTRIES = 1_000_000
READ_TYPES = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
)
"""Stored types whose values the ``gguf`` package gives back exactly."""
SIZES = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "vocab_size": "vocab_size",
}
FLOATS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps", "rope.freq_base": "rope_theta"}
WIDTHS = ("attention.key_length", "attention.value_length", "rope.dimension_count")
"""All of them are the width of a head."""
TOKENS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
ARCHITECTURES = ("llama", "qwen2", "qwen3")
SCALING = (
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
    "rope.scale_linear",
)
NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.finetuned": (True, False),
    "tensor_data_layout": ("Meta AI original pth",),
    "use_parallel_residual": (False,),
}
"""Keys of an architecture that change nothing at these values."""


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One tensor: its shape as torch has it, its stored type, and where its bytes begin."""

    shape: tuple[int, ...]
    kind: str
    start: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """Keys with their values (arrays by their length) and tensors by name."""

    path: Path
    keys: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """Such as ``llama``."""
        return str(self.keys.get("general.architecture", ""))

    def of_model(self, name: str, default: Any = None) -> Any:
        """A key below the architecture's name."""
        return self.keys.get(f"{self.architecture}.{name}", default)

    def floats(self, name: str) -> np.ndarray:
        """A small F32 tensor's values."""
        tensor = self.tensors[name]
        if tensor.kind != "F32":
            raise ModelError(f"{self.path}: '{name}' is {tensor.kind}, which should be F32")
        with self.path.open("rb") as file:
            file.seek(tensor.start)
            return np.frombuffer(file.read(tensor.nbytes), dtype="<f4")

    def check(self) -> None:
        """Refuse what would be read wrongly.

        Raises:
            ModelError: a part of a split file, a stored type that is not read exactly, keys that
                are not understood, or fewer or more blocks than the file says.
        """
        parts = int(self.keys.get("split.count", 1) or 1)
        if parts > 1:
            raise ModelError(
                f"{self.path} is one of {parts} parts: join them with 'gguf-split --merge' first"
            )
        odd = sorted({t.kind for t in self.tensors.values()} - set(READ_TYPES))
        if odd:
            raise ModelError(
                f"{self.path} stores weights as {odd[0]}, which is not read:"
                f" quantise it as one of {', '.join(READ_TYPES)}"
            )
        if self.architecture not in ARCHITECTURES:
            raise ModelError(
                f"{self.path} holds the architecture '{self.architecture[:40]}', which is not read"
                f" from GGUF: use one of {', '.join(ARCHITECTURES)}"
            )
        mine = f"{self.architecture}."
        known = {*SIZES, *FLOATS, *WIDTHS, *SCALING}
        for key, value in sorted(self.keys.items()):
            name = key.removeprefix(mine)
            if key.startswith(mine) and name not in known and value not in NEUTRAL.get(name, ()):
                raise ModelError(
                    f"{self.path} says '{key[:120]}' = {str(value)[:40]}, which pdtrim does not"
                    " know: it may change what the weights compute"
                )
        blocks = {name.split(".")[1] for name in self.tensors if name.startswith("blk.")}
        counted = self.of_model("block_count")
        if blocks != {str(i) for i in range(int(counted or 0))}:
            raise ModelError(
                f"{self.path} counts {counted} blocks, but holds the weights of {len(blocks)}"
            )

    def config(self) -> dict[str, Any]:
        """What a ``config.json`` would hold, RoPE's scaling left out.

        Raises:
            ModelError: a size that is missing, or heads whose keys, values and rotations differ in
                width.
        """
        own = {key: self.of_model(key) for key in (*SIZES, *FLOATS, *WIDTHS)}
        if own["vocab_size"] is None:
            own["vocab_size"] = self.keys.get("tokenizer.ggml.tokens")  # a list's length
        own["attention.head_count_kv"] = own["attention.head_count_kv"] or own[HEADS]
        absent = [key for key in SIZES if own[key] is None]
        if absent:
            raise ModelError(f"{self.path} lacks the key '{self.architecture}.{absent[0]}'")
        widths = {own[key] for key in WIDTHS if own[key] is not None}
        if not widths and isinstance(own[HEADS], int) and own[HEADS]:
            widths = {own["embedding_length"] // own[HEADS]}
        if len(widths) != 1:
            raise ModelError(
                f"{self.path}: keys, values and rotations of a head are {sorted(widths)} wide, not"
                " all the same"
            )
        tokens = {name: self.keys[key] for key, name in TOKENS.items() if key in self.keys}
        found = {name: own[key] for key, name in (SIZES | FLOATS).items() if own[key] is not None}
        return {
            "model_type": self.architecture,
            "rope_theta": 10_000.0,  # where a file names none
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "head_dim": widths.pop(),
            **found,
            **tokens,
        }

    def check_tensors(self, parameters: Iterable[str]) -> None:
        """Refuse tensors that the architecture does not have: transformers leaves them out.

        Args:
            parameters: the architecture's, by transformers' names.

        Raises:
            ModelError: naming the first.
        """
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
        known = get_tensor_name_map(numbers[self.architecture], int(self.of_model("block_count")))
        names = {FREQUENCIES}
        for parameter in parameters:
            base, _, leaf = parameter.rpartition(".")
            names.add(f"{known.get_name(base)}.{leaf}")
        odd = sorted(set(self.tensors) - names)
        if odd:
            raise ModelError(
                f"{self.path} holds '{odd[0]}', which transformers'"
                f" '{self.architecture}' does not have: it would be left out"
            )


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF file does."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_gguf(path: Path) -> GgufHeader:
    """The header of a GGUF file.

    Raises:
        ModelError: not such a file, cut short, or one that lies about its sizes.
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    with path.open("rb") as file:
        reader = _Reader(path, file)
        if reader.take(4) != MAGIC:
            raise ModelError(f"{path} is no GGUF file: it does not begin with 'GGUF'")
        version = reader.number("I")
        if version not in VERSIONS:
            raise ModelError(f"{path} is GGUF version {version}: only {VERSIONS} are read")
        num_tensors, num_keys = reader.number("Q"), reader.number("Q")
        if max(num_tensors, num_keys) > MAX_ENTRIES:
            raise ModelError(f"{path} claims {max(num_tensors, num_keys):,} entries: it is damaged")
        keys: dict[str, Any] = {}
        for _ in range(num_keys):
            name = reader.string()
            keys[name] = reader.value(reader.number("I"))
        entries = []
        for _ in range(num_tensors):
            name = reader.string()
            dimensions = reader.number("I")
            if dimensions > 4:
                raise ModelError(f"{path}: tensor '{name}' has {dimensions} dimensions: damaged")
            shape = tuple(reader.number("Q") for _ in range(dimensions))[::-1]
            entries.append((name, shape, reader.number("I"), reader.number("Q")))
        alignment = int(keys.get("general.alignment", 32))
        if not 0 < alignment <= 2**20:
            raise ModelError(f"{path} claims an alignment of {alignment}: it is damaged")
        begin = -(-file.tell() // alignment) * alignment
        tensors = {}
        for name, shape, number, offset in entries:
            try:
                kind = GGMLQuantizationType(number)
            except ValueError:
                raise ModelError(f"{path}: tensor '{name}' has the unknown type {number}") from None
            per_block, block_bytes = GGML_QUANT_SIZES[kind]
            nbytes = -(-math.prod(shape) // per_block) * block_bytes
            if begin + offset + nbytes > reader.size:
                raise ModelError(f"{path} is cut short: tensor '{name}' is not wholly there")
            tensors[name] = GgufTensor(
                shape=shape, kind=kind.name, start=begin + offset, nbytes=nbytes
            )
        if len(tensors) < len(entries):
            raise ModelError(f"{path} has two tensors of one name: it is damaged")
    return GgufHeader(path=path, keys=keys, tensors=tensors)


class _Reader:
    """Numbers and strings of a file, each held against what is left of it."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = path.stat().st_size

    def take(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise ModelError(f"{self.path} is cut short or damaged: its header is not wholly there")
        return self.file.read(count)

    def number(self, code: str) -> Any:
        form = struct.Struct("<" + code)
        return form.unpack(self.take(form.size))[0]

    def string(self) -> str:
        length = self.number("Q")
        if length > MAX_STRING:
            raise ModelError(f"{self.path} has a text of {length:,} bytes: it is damaged")
        return self.take(length).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        """A value; an array's is its length, and its items are passed over."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise ModelError(f"{self.path} has a value of unknown type {kind}: it is damaged")
        inner, length = self.number("I"), self.number("Q")
        if inner in SCALARS:
            self.take(length * struct.calcsize("<" + SCALARS[inner]))
        elif inner == STRING:
            if 8 * length > self.size - self.file.tell():
                raise ModelError(f"{self.path} is cut short or damaged: a list is not wholly there")
            for _ in range(length):
                self.take(self.number("Q"))
        else:
            raise ModelError(f"{self.path} has a list of lists, which no model needs")
        return length
