"""Stage times from AIConfigurator, NVIDIA's measured tables of single operations by engine and GPU.

An optional extra: ``pip install aiconfigurator-core``. It sums the measured operations of a model
of any number of layers, without a GPU; its name for where a number is from (measured, or between
measured ones, or a formula) stays with it. Apache-2.0.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pdtrim.cost.times import DecodeRow, PrefillRow, Shape, StageTimes
from pdtrim.errors import PdtrimError, border
from pdtrim.reading.json_text import read_json

PROMPTS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (128, 512, 1024, 2048, 4096, 8192, 16384, 32768)
PARTS = {
    "outside": ("embedding", "logits_gemm", "embedding_ar", "p2p"),
    "attention": ("add_norm_1", "qkv_gemm", "attention", "proj_gemm", "ar_1"),
    "mlp": ("add_norm_2", "gate_ffn1_gemm", "act_gate", "ffn2_gemm", "ar_2"),
}
KV = ("add_norm_1", "qkv_gemm")
KV_ALONE = 1.91
"""Times the norm and the share of K's and V's columns that making keys and values alone takes, with
their rotation and writing: prefill without 16 of 32 blocks in ``bench-stages`` on an H100."""
ENGINE = "vllm"
DIGITS = 5
"""Of a time that is kept."""


def aiconfigurator_times(model: str, system: str) -> StageTimes:
    """Times of a dense model's stages, by AIConfigurator's newest tables of vLLM.

    Args:
        model: a folder with ``config.json``, or one of the models whose config AIConfigurator has.
        system: its name for a GPU, such as ``h100_sxm``.

    Raises:
        PdtrimError: it is not installed, or does not know the system or the model.
    """
    try:
        import aiconfigurator_core
        import yaml
        from aiconfigurator_core.sdk.engine import EngineHandle
    except ImportError:
        raise PdtrimError(
            "AIConfigurator is not installed: pip install aiconfigurator-core"
        ) from None
    home = Path(aiconfigurator_core.__file__).parent
    spec = home / "systems" / f"{system}.yaml"
    if not system.replace("_", "").isalnum() or not spec.is_file():
        known = ", ".join(sorted(path.stem for path in (home / "systems").glob("*.yaml")))
        raise PdtrimError(f"AIConfigurator does not know system '{system}': use one of {known}")
    shape = shape_of(read_json(_config(model, home)), model)
    with border(PdtrimError, f"AIConfigurator and '{model}' on {system}"), _quiet():
        handle = EngineHandle.compile(model, system, ENGINE)
        memory = int(yaml.safe_load(spec.read_text(encoding="utf-8"))["gpu"]["mem_capacity"])
        prefill = tuple(_prompt(handle, shape, tokens) for tokens in PROMPTS)
        decode = tuple(_step(handle, rows, context) for rows in ROWS for context in CONTEXTS)
    tables = sorted((home / "systems" / "data" / system / "gemm" / ENGINE).glob("*"))
    which = f", {ENGINE} {tables[-1].name}" if tables else f", {ENGINE}"
    return StageTimes(
        schema="pdtrim.stage-times/1",
        source=f"AIConfigurator {version('aiconfigurator-core')}{which}",
        system=system,
        gpu_memory_bytes=memory,
        model=shape,
        prefill=prefill,
        decode=decode,
    )


def shape_of(config: Any, name: str) -> Shape:
    """Of a config in transformers' form.

    Raises:
        PdtrimError: a key is missing, or the model has experts.
    """
    with border(PdtrimError, f"the config of '{name}'"):
        if any("expert" in key for key in config):
            raise PdtrimError(f"'{name}' has experts, which are not modelled")
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        shape = Shape(
            name=Path(name).name,
            layers=config["num_hidden_layers"],
            hidden=hidden,
            neurons=config["intermediate_size"],
            heads=heads,
            kv_heads=config["num_key_value_heads"],
            head_dim=config.get("head_dim") or hidden // heads,
            parameters=1,
        )
        tables = 1 if config.get("tie_word_embeddings") else 2
        block = shape.attention_parameters + shape.mlp_parameters + 2 * hidden
        count = tables * config["vocab_size"] * hidden + shape.layers * block + hidden
        return shape.model_copy(update={"parameters": count})


def _config(model: str, home: Path) -> Path:
    folder = Path(model)
    if folder.is_dir():
        return folder / "config.json"
    kept = home / "model_configs" / f"{model.replace('/', '--')}_config.json"
    if kept.parent != home / "model_configs" or not kept.is_file():
        raise PdtrimError(f"AIConfigurator has no config of '{model}': give a folder with one")
    return kept


def _prompt(handle: Any, shape: Shape, tokens: int) -> PrefillRow:
    ops, _ = handle.run_static_per_op(batch_size=1, isl=tokens, osl=2)
    parts = _parts(ops, "context_")
    share = 2 * shape.kv_heads / (shape.heads + 2 * shape.kv_heads)
    norm, product = (seconds for name, seconds in _seconds(ops, "context_") if name in KV)
    return PrefillRow(tokens=tokens, kv_s=_short(KV_ALONE * (norm + product * share)), **parts)


def _step(handle: Any, rows: int, context: int) -> DecodeRow:
    _, ops = handle.run_static_per_op(batch_size=rows, isl=context, osl=2)
    return DecodeRow(rows=rows, context=context, **_parts(ops, "generation_"))


def _seconds(ops: Any, prefix: str) -> list[tuple[str, float]]:
    return [(name.removeprefix(prefix), ms / 1e3) for name, ms, *_ in ops]


def _parts(ops: Any, prefix: str) -> dict[str, float]:
    sums = dict.fromkeys(PARTS, 0.0)
    for name, seconds in _seconds(ops, prefix):
        part = next((part for part, names in PARTS.items() if name in names), None)
        if part is None:
            raise PdtrimError(f"operation '{name}' is none of a plain decoder's")
        sums[part] += seconds
    return {
        "seconds": _short(sum(sums.values())),
        "attention_s": _short(sums["attention"]),
        "mlp_s": _short(sums["mlp"]),
    }


def _short(seconds: float) -> float:
    return float(f"{seconds:.{DIGITS}g}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what it says of tables that no plain decoder reads."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
