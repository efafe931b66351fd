"""How positions are rotated: the RoPE scaling that is understood, and GGUF's words for it.

The allowed types give each position one angle, whatever else is in the batch. ``dynamic`` and
``longrope`` do not: their angles follow the longest sequence of a call, so that a prompt's keys
would differ between prefill and decode. Llama 3's scaling stands in a GGUF file as one factor a
frequency, ``rope_freqs.weight``; the parameters are recovered from the factors and proven by them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from pdtrim.errors import ModelError
from pdtrim.models.gguf import FREQUENCIES, GgufHeader

NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""The scalings that are understood, and the numbers that each needs."""
LLAMA3_LOW, LLAMA3_HIGH = 1.0, 4.0
"""``low_freq_factor`` and ``high_freq_factor`` of every Llama 3 release."""


def check_rope(config: PreTrainedConfig, where: str) -> None:
    """Refuse RoPE that depends on a batch, differs between layers, or is not known.

    Raises:
        ModelError: with the type and those that are known, or the number that it lacks.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if not isinstance(rope, Mapping):
        raise ModelError(f"{where}: its rope parameters are no object")
    if any(isinstance(value, dict) for value in rope.values()):
        raise ModelError(f"{where} rotates its layers in different ways, which is not supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in NUMBERS or rope.get("type", kind) != kind:
        raise ModelError(
            f"{where} scales RoPE by '{str(kind)[:40]}': only {', '.join(NUMBERS)} give a token the"
            " same angle in every batch; set another rope_type in config.json"
        )
    for key in ("rope_theta", *NUMBERS[kind]):
        value = rope.get(key)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ModelError(
                f"{where}: the rope type '{kind}' needs a positive number as {key}, not"
                f" {str(value)[:40]!r}"
            )
    parts = rope.get("partial_rotary_factor"), getattr(config, "partial_rotary_factor", None)
    if any(part not in (None, 1) for part in parts):
        raise ModelError(f"{where} rotates a part of each head only, which is not supported")


def gguf_rope(header: GgufHeader, theta: float, head_dim: int) -> dict[str, Any] | None:
    """The scaling that a GGUF file states, as transformers' ``rope_parameters``; None if none.

    Args:
        theta: the base of the wavelengths.

    Raises:
        ModelError: a scaling that is not understood.
    """
    stated = _stated(header, theta)
    if FREQUENCIES not in header.tensors:
        return stated
    if stated is not None:
        raise ModelError(f"{header.path} scales RoPE twice, by keys and by '{FREQUENCIES}'")
    factors_F = header.floats(FREQUENCIES)
    if factors_F.shape != (head_dim // 2,):
        raise ModelError(f"{header.path}: '{FREQUENCIES}' is no set of {head_dim // 2} factors")
    return llama3_of(factors_F, theta, str(header.path))


def _stated(header: GgufHeader, theta: float) -> dict[str, Any] | None:
    linear = header.of_model("rope.scale_linear", 0.0)  # older files' way
    kind = header.of_model("rope.scaling.type", "linear" if linear else "none")
    factor = header.of_model("rope.scaling.factor", linear)
    if kind == "none":
        if factor not in (0, 1):
            raise ModelError(f"{header.path} scales RoPE by {factor}, but does not say how")
        return None
    if kind in ("linear", "yarn") and factor in (0, 1):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": float(factor)}
    original = header.of_model("rope.scaling.original_context_length")
    if kind == "yarn" and original:
        return {
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": float(factor),
            "original_max_position_embeddings": int(original),
        }
    raise ModelError(
        f"{header.path} scales RoPE by '{kind}', which cannot be read from a GGUF file:"
        " give the model's safetensors folder"
    )


def llama3_factors_F(
    theta: float, frequencies: int, *, factor: float, low: float, high: float, original: int
) -> np.ndarray:
    """What Llama 3 divides each frequency by, ``[F]``; from the longest wavelength's side.

    Formula: "The Llama 3 Herd of Models" (2407.21783) and its published code.
    """
    wavelength_F = 2 * math.pi * theta ** (np.arange(frequencies) / frequencies)
    smooth_F = np.clip((original / wavelength_F - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth_F) / factor + smooth_F)


def llama3_of(factors_F: np.ndarray, theta: float, where: str) -> dict[str, Any] | None:
    """The Llama 3 parameters whose factors are these; None if all are 1.

    Raises:
        ModelError: no parameters give these factors.
    """
    factors_F = factors_F.astype(np.float64)
    if not len(factors_F) or not np.isfinite(factors_F).all():
        raise ModelError(f"{where}: '{FREQUENCIES}' holds no finite factors")
    if np.allclose(factors_F, 1.0, rtol=1e-5):
        return None
    factor = float(factors_F.max())
    for original in _lengths(factors_F, theta, factor):
        made_F = llama3_factors_F(
            theta,
            len(factors_F),
            factor=factor,
            low=LLAMA3_LOW,
            high=LLAMA3_HIGH,
            original=original,
        )
        if np.allclose(made_F, factors_F, rtol=1e-3):
            return {
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": factor,
                "low_freq_factor": LLAMA3_LOW,
                "high_freq_factor": LLAMA3_HIGH,
                "original_max_position_embeddings": original,
            }
    raise ModelError(
        f"{where} scales RoPE by factors that are not Llama 3's: give the model's safetensors"
        " folder"
    )


def _lengths(factors_F: np.ndarray, theta: float, factor: float) -> list[int]:
    """Original context lengths that the factors may come from, the likeliest first."""
    wavelength_F = 2 * math.pi * theta ** (np.arange(len(factors_F)) / len(factors_F))
    between = (factors_F > 1 + 1e-4) & (factors_F < factor * (1 - 1e-4))
    if between.any():
        smooth = (1 / factors_F[between] - 1 / factor) / (1 - 1 / factor)
        found = wavelength_F[between] * (smooth * (LLAMA3_HIGH - LLAMA3_LOW) + LLAMA3_LOW)
        return [8192, round(float(np.median(found)))]
    ones, scaled = wavelength_F[factors_F <= 1 + 1e-4], wavelength_F[factors_F > 1 + 1e-4]
    least = LLAMA3_HIGH * float(ones.max()) if len(ones) else 1.0
    return [8192, round(math.sqrt(least * float(scaled.min())))]
