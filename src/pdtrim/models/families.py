"""The families that pdtrim supports, by transformers model type."""

from __future__ import annotations

from transformers import PreTrainedConfig

from pdtrim.errors import ModelError
from pdtrim.models.block import Block
from pdtrim.models.mistral import MistralBlock
from pdtrim.models.phi3 import Phi3Block
from pdtrim.models.qwen2 import Qwen2Block
from pdtrim.models.qwen3 import Qwen3Block

FAMILIES: dict[str, type[Block]] = {
    "llama": Block,  # Llama 1 to 3.x, SmolLM2
    "mistral": MistralBlock,
    "phi3": Phi3Block,
    "qwen2": Qwen2Block,  # and Qwen2.5
    "qwen3": Qwen3Block,
}


def family_of(config: PreTrainedConfig) -> type[Block]:
    """The adapter for a config.

    Raises:
        ModelError: the architecture is not supported; the message names it and those that are.
    """
    return family_named(config.model_type, config.architectures)


def family_named(model_type: str, architectures: object = None) -> type[Block]:
    """The adapter for a model type.

    Args:
        architectures: what the config calls its class, for the error.

    Raises:
        ModelError: the architecture is not supported; the message names it and those that are.
    """
    family = FAMILIES.get(model_type)
    if family is None:
        names = architectures if isinstance(architectures, list | tuple) else ()
        name = ", ".join(str(name) for name in names) or "unnamed architecture"
        raise ModelError(
            f"{name} (model type '{model_type}') is not supported; "
            f"supported model types: {', '.join(FAMILIES)}"
        )
    return family
