"""Shapes of models to time without their weights: three by name, or any ``config.json``.

Sizes are those that the models' publishers give in their own ``config.json``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from pdtrim.errors import PdtrimError
from pdtrim.models.configs import ATTENTION, config_of
from pdtrim.models.loading import quiet
from pdtrim.models.model import Model
from pdtrim.models.stored import read_config

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
    },
    "llama-2-13b": {
        "model_type": "llama",
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "max_position_embeddings": 4096,
        "num_attention_heads": 40,
        "num_hidden_layers": 40,
        "num_key_value_heads": 40,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 32768,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "vocab_size": 152064,
    },
}


def shape_config(shape: str) -> PreTrainedConfig:
    """The config of a named shape, or of a model's folder.

    Raises:
        PdtrimError: neither a name nor a folder, or a config that is not supported.
    """
    if shape in SHAPES:
        return config_of(SHAPES[shape], f"'{shape}'")
    folder = Path(shape)
    if not (folder / "config.json").is_file():
        raise PdtrimError(
            f"no shape '{shape}': use one of {', '.join(SHAPES)}, or a folder with a config.json"
        )
    return config_of(read_config(folder), shape)


def random_model(
    config: PreTrainedConfig, *, dtype: torch.dtype, device: torch.device, name: str
) -> Model:
    """A model of a shape with random weights, each drawn where it stays."""
    torch.manual_seed(0)
    with quiet(), torch.device(device):
        network: Any = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=ATTENTION
        )
    return Model(network.requires_grad_(False), name=name)


def one_block(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same shape with a single block and a vocabulary of one token."""
    small = type(config).from_dict(config.to_dict())
    small.num_hidden_layers, small.vocab_size = 1, 1
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:1]
    small.bos_token_id = small.eos_token_id = small.pad_token_id = None
    small.tie_word_embeddings = True
    return small
