"""One transformer block, taken apart: norms, projections, rotary positions, MLP.

Llama's names are those of Mistral and Qwen too, so this class serves them. A family that differs
is a subclass in a file of its own (``qwen3.py``), listed in ``families.py``. What a config key
means is a fact of the family: transformers reads the same key differently from model to model.

Shapes: B batch, T tokens, E hidden width, H query heads, G KV heads, D head width.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedConfig

from pdtrim.kv.bias import KVBias, turn
from pdtrim.kv.selectors import SelectorBase

Rope = tuple[Tensor, Tensor]
"""cos and sin of the rotary angles, each ``[B, T, D]``."""


def rotate(x_BHTD: Tensor, rope: Rope) -> Tensor:
    """Turn each pair of channels (i, i + D/2) by its position's angle (RoFormer, 2104.09864)."""
    cos, sin = (part.unsqueeze(1) for part in rope)
    return turn(x_BHTD, cos, sin)


class Block:
    """The parts of one transformers decoder layer, each callable alone.

    A part that a stage's checkpoint does not hold is None in ``module``; its gate is never open.
    """

    biases_every_key: ClassVar[bool] = True
    """Whether a bias of the key's projection is added to every key as it is."""

    def __init__(self, module: Any, *, window: int | None = None) -> None:
        self.module = module
        self.window = window

    @classmethod
    def window_of(cls, config: PreTrainedConfig, slot: int) -> int | None:
        """Tokens that a query may look back over, itself included, as transformers has it.

        Llama's attention reads all of them, whatever its config says about windows.

        Args:
            slot: of the block in this checkpoint.
        """
        del config, slot
        return None

    @property
    def attention(self) -> Any:
        """The attention module."""
        return self.module.self_attn

    @property
    def scale(self) -> float:
        """What query-key products are multiplied by."""
        return float(self.attention.scaling)

    def attention_norm(self, x_BTE: Tensor) -> Tensor:
        """The norm before attention."""
        return self.module.input_layernorm(x_BTE)

    def project_q(self, h_BTE: Tensor, rope: Rope) -> Tensor:
        """Rotated queries ``[B, H, T, D]`` of the normed stream."""
        return rotate(self.raw_q(h_BTE), rope)

    def raw_q(self, h_BTE: Tensor) -> Tensor:
        """Queries before the rotation, ``[B, H, T, D]``."""
        return self._heads("q_proj", "q_norm", h_BTE)

    def project_kv(self, h_BTE: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Rotated keys and values, each ``[B, G, T, D]``, of the normed stream."""
        return rotate(self._heads("k_proj", "k_norm", h_BTE), rope), self._heads(
            "v_proj", None, h_BTE
        )

    def kv_bias(self) -> KVBias | None:
        """What biases add to every key before the rotation, and to every value; None if nothing."""
        k, v = self.attention.k_proj.bias, self.attention.v_proj.bias
        if k is None or v is None or not self.biases_every_key:
            return None
        D = self.attention.head_dim
        return KVBias(k_GD=k.detach().view(-1, D), v_GD=v.detach().view(-1, D))

    def project_output(self, o_BHTD: Tensor) -> Tensor:
        """What attention adds to the stream, ``[B, T, E]``."""
        return self.attention.o_proj(o_BHTD.transpose(1, 2).flatten(2))

    def mlp(self, x_BTE: Tensor) -> Tensor:
        """What the MLP adds to the stream, its norm included."""
        return self.module.mlp(self.module.post_attention_layernorm(x_BTE))

    def _heads(self, projection: str, norm: str | None, h_BTE: Tensor) -> Tensor:
        """Project and split into heads; ``norm`` names a per-head norm that the family may have."""
        del norm
        x_BTF = getattr(self.attention, projection)(h_BTE)
        return x_BTF.unflatten(-1, (-1, self.attention.head_dim)).transpose(1, 2)

    # Parameter names (below the block) that each gate needs; export writes just these.

    KV_PARTS: ClassVar[tuple[str, ...]] = (
        "input_layernorm",
        "self_attn.k_proj",
        "self_attn.v_proj",
    )
    ATTENTION_PARTS: ClassVar[tuple[str, ...]] = (*KV_PARTS, "self_attn.q_proj", "self_attn.o_proj")
    MLP_PARTS: ClassVar[tuple[str, ...]] = ("post_attention_layernorm", "mlp")

    @classmethod
    def parts(
        cls, *, attention: str | bool, mlp: bool, selector: SelectorBase | None = None
    ) -> tuple[str, ...]:
        """Names of the submodules that a block with these gates needs.

        A selector that reads queries or the output projection needs them of a ``kv`` block too.
        """
        needed: tuple[str, ...] = ()
        selects = selector is not None and (selector.reads_queries or selector.reads_output)
        if attention in ("full", True) or (attention == "kv" and selects):
            needed += cls.ATTENTION_PARTS
        elif attention == "kv":
            needed += cls.KV_PARTS
        return needed + cls.MLP_PARTS if mlp else needed
