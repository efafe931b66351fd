"""The families that pdtrim supports, by transformers model type."""

from __future__ import annotations

from transformers import PreTrainedConfig

from pdtrim.errors import ModelError
from pdtrim.models.block import Block
from pdtrim.models.qwen3 import Qwen3Block

FAMILIES: dict[str, type[Block]] = {
    "llama": Block,  # Llama 1 to 3.x, SmolLM2
    "mistral": Block,  # the early releases have a sliding window
    "qwen2": Block,  # Qwen2 and Qwen2.5: biases on q, k and v live in the projections
    "qwen3": Qwen3Block,
}


def family_of(config: PreTrainedConfig) -> type[Block]:
    """The adapter for a config.

    Raises:
        ModelError: the architecture is not supported; the message names it and those that are.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        name = ", ".join(config.architectures or ()) or "unnamed architecture"
        raise ModelError(
            f"{name} (model type '{config.model_type}') is not supported; "
            f"supported model types: {', '.join(FAMILIES)}"
        )
    return family


def window_of(config: PreTrainedConfig, layer: int) -> int | None:
    """Tokens that a query of this layer may look back over, itself included; None: all."""
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return None
    types = getattr(config, "layer_types", None)
    if types is not None and types[layer] != "sliding_attention":
        return None
    return int(window)
