"""A transformers config from a stranger's ``config.json``, with nothing in it that acts.

Only keys that say what the weights compute are taken. Others can make transformers fetch a kernel
(``attn_implementation``), read another file (``transformers_weights``), patch modules
(``fusion_config``) or return other types (``return_dict``): they are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig

from pdtrim.errors import ModelError, border
from pdtrim.models.block import head_width
from pdtrim.models.families import family_named
from pdtrim.models.model import ARCHITECTURE_KEYS
from pdtrim.models.rope import check_rope

ATTENTION = "sdpa"
"""Which of transformers' attentions runs, whatever a config asks for: some are downloaded code."""
OLD_KEYS = (
    *("max_window_layers", "original_max_position_embeddings", "partial_rotary_factor"),
    *("rope_scaling", "rope_theta"),
)
"""Keys that transformers reads though its config classes do not declare them."""
SIZES = (
    *("hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads"),
    *("num_hidden_layers", "num_key_value_heads", "vocab_size"),
)
OPTIONAL_SIZES = ("head_dim", "num_key_value_heads")
LARGEST = 2**31
MAX_LAYERS = 1000
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def config_of(data: Mapping[str, Any], where: str) -> PreTrainedConfig:
    """The config of a supported family, its sizes and its RoPE checked.

    Args:
        data: the object in ``config.json``.
        where: what an error calls the model.

    Raises:
        ModelError: another family, a size that is none, an unknown RoPE scaling, or whatever else
            transformers refuses.
    """
    family_named(data["model_type"], data.get("architectures"))
    if data["model_type"] == "mistral" and data.get("layer_types") is not None:
        raise ModelError(
            f"{where}: transformers takes a Mistral config with layer_types for Ministral, which is"
            " not supported"
        )
    kind = CONFIG_MAPPING[data["model_type"]]
    own = {field.name for field in dataclasses.fields(kind)}
    own -= {field.name for field in dataclasses.fields(PreTrainedConfig)}
    known = (own | set(ARCHITECTURE_KEYS) | set(OLD_KEYS)) - {"model_type"}
    taken = {key: value for key, value in data.items() if key in known}
    for key in (key for key in SIZES if key in taken):
        _check_size(key, taken[key], where)
    with border(ModelError, f"{where} has a config that transformers does not read"):
        config: PreTrainedConfig = kind(**taken)
    _check_heads(config, where)
    check_rope(config, where)
    _check_window(config, where)
    _check_tokens(config, where)
    config._attn_implementation = ATTENTION
    return config


def generation_ids(data: Mapping[str, Any], where: str) -> GenerationConfig:
    """Begin, end and padding tokens; whatever else a config says about sampling is left out.

    The sampling is the user's, and transformers refuses to write what others have published, such
    as a temperature without ``do_sample``.

    Raises:
        ModelError: an id that is no whole number.
    """
    ids = {key: data.get(key) for key in TOKENS}
    for key, value in ids.items():
        several = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if not all(v is None or (isinstance(v, int) and not isinstance(v, bool)) for v in several):
            raise ModelError(f"{where}: {key} {str(value)[:60]!r} is no token id")
    return GenerationConfig(**ids)


def _check_size(key: str, value: object, where: str) -> None:
    if value is None and key in OPTIONAL_SIZES:
        return
    least, most = (0, MAX_LAYERS) if key == "num_hidden_layers" else (1, LARGEST)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ModelError(
            f"{where}: {key} {str(value)[:40]!r} is not a whole number from {least} to {most}"
        )


def _check_heads(config: Any, where: str) -> None:
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    width = head_width(config)
    if heads % groups or width % 2 or width < 2:
        raise ModelError(
            f"{where}: {heads} query heads of width {width} do not share {groups} KV heads evenly,"
            " or the width is odd"
        )
    eps = config.rms_norm_eps
    if not isinstance(eps, float) or not 0 <= eps < 1:
        raise ModelError(f"{where}: rms_norm_eps {str(eps)[:40]} is no small number")


def _check_window(config: Any, where: str) -> None:
    window = getattr(config, "sliding_window", None)
    if window is not None and not (isinstance(window, int) and 0 < window <= LARGEST):
        raise ModelError(f"{where}: sliding_window {str(window)[:40]} is no number of tokens")


def _check_tokens(config: Any, where: str) -> None:
    generation_ids({key: getattr(config, key, None) for key in TOKENS}, where)
    pad, vocabulary = config.pad_token_id, config.vocab_size
    if pad is not None and not -vocabulary <= pad < vocabulary:
        raise ModelError(
            f"{where}: pad_token_id {pad} is beyond the vocabulary of {vocabulary}: correct it in"
            " config.json"
        )
