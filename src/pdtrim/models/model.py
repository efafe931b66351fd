"""A causal language model as pdtrim sees it: embedding, blocks by dense layer index, head."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pdtrim.errors import ModelError
from pdtrim.finite import finite
from pdtrim.models.block import Block, Rope, head_width
from pdtrim.models.emulated import quicken
from pdtrim.models.families import family_of
from pdtrim.models.rope import check_rope
from pdtrim.plan import BaseModelRef

ARCHITECTURE_KEYS = (
    "attention_bias",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "mlp_bias",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "tie_word_embeddings",
    "use_sliding_window",
    "vocab_size",
)


class Model:
    """A dense model, or the part of one that a stage's checkpoint holds.

    Args:
        network: a transformers causal LM of a supported family, in eval mode.
        tokenizer: None for models that are fed token ids only.
        name: what the user called it; written into plans.
        layers: dense layer index of each of the network's blocks; None means all, in order.
        num_layers: layers of the dense model, where ``layers`` is given.
        licence: what the model's card says of it; goes into the card of an exported pair.

    Raises:
        ModelError: an unsupported architecture, or RoPE that is not understood.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        name: str = "in-memory",
        revision: str | None = None,
        layers: tuple[int, ...] | None = None,
        num_layers: int | None = None,
        licence: dict[str, str] | None = None,
    ) -> None:
        family = family_of(network.config)
        check_rope(network.config, f"'{name}'")
        quicken(network)
        modules = list(network.model.layers)
        layers = tuple(range(len(modules))) if layers is None else layers
        assert len(layers) == len(modules)
        self.network: Any = network.eval()  # its parts differ by family
        self.tokenizer = tokenizer
        self.name = name
        self.revision = revision
        self.licence = licence or {}
        self.blocks: list[Block | None] = [None] * (num_layers or len(modules))
        for slot, (layer, module) in enumerate(zip(layers, modules, strict=True)):
            self.blocks[layer] = family(module, window=family.window_of(network.config, slot))

    def like(self, network: PreTrainedModel) -> Model:
        """Another network under the same name."""
        return Model(
            network,
            self.tokenizer,
            name=self.name,
            revision=self.revision,
            licence=self.licence,
        )

    @property
    def config(self) -> PreTrainedConfig:
        """The transformers config."""
        return self.network.config

    @property
    def num_layers(self) -> int:
        """Layers of the dense model."""
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type."""
        return self.network.dtype

    @property
    def dtype_name(self) -> str:
        """The weights' type as a user names it, such as ``bfloat16``."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def num_kv_heads(self) -> int:
        """KV heads a layer."""
        return int(self.config.num_key_value_heads)

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return head_width(self.config)

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end a generation, by the model's own settings; chat models have several."""
        settings = self.network.generation_config
        end = settings.eos_token_id if settings else None
        return end if isinstance(end, list) else [] if end is None else [end]

    def block(self, layer: int) -> Block:
        """The block at a dense layer index, which this checkpoint must hold."""
        block = self.blocks[layer]
        assert block is not None, f"layer {layer} is not in this checkpoint"
        return block

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Token ids to the residual stream ``[B, T, E]``."""
        return self.network.model.embed_tokens(ids_BT)

    def rope(self, positions_BT: Tensor) -> Rope:
        """Rotary angles of absolute positions."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return self.network.model.rotary_emb(like, positions_BT)

    def head(self, y_BTE: Tensor) -> Tensor:
        """The last stream to logits ``[B, T, V]``, final norm included.

        Raises:
            PdtrimError: the stream has NaN or infinity, or numbers whose squares are beyond fp32:
                the norm would make zeros of those, without a word.
        """
        squares_BT = y_BTE.detach().float().square().mean(-1)
        finite(squares_BT, f"what the last block of '{self.name}' writes")
        return self.network.lm_head(self.network.model.norm(y_BTE))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the architecture and of every weight rounded to bf16.

        Rounding makes it the same whether the weights were loaded as bf16 or fp32.
        """
        digest = hashlib.sha256(json.dumps(architecture(self.config), sort_keys=True).encode())
        for name, tensor in sorted(self.network.state_dict(keep_vars=True).items()):
            digest.update(name.encode())
            data = tensor.detach().to("cpu", torch.bfloat16).contiguous()
            digest.update(data.view(torch.int16).numpy().data)
        return digest.hexdigest()

    @cached_property
    def ref(self) -> BaseModelRef:
        """What a plan records of its base model."""
        return BaseModelRef(
            name=self.name,
            revision=self.revision,
            family=self.config.model_type,
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            fingerprint=self.fingerprint,
        )

    def need_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            ModelError: the model has none.
        """
        if self.tokenizer is None:
            raise ModelError(f"model '{self.name}' has no tokenizer, so it cannot read text")
        return self.tokenizer


def architecture(config: PreTrainedConfig) -> dict[str, Any]:
    """The config entries that decide what the weights compute."""
    data = config.to_dict()
    return {key: data.get(key) for key in ARCHITECTURE_KEYS}
