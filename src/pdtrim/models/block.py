"""One transformer block, taken apart: norms, projections, rotary positions, MLP.

Llama's names are those of Mistral and Qwen too, so this class serves them. A family that differs
is a subclass in a file of its own (``qwen3.py``), listed in ``families.py``. What a config key
means is a fact of the family: transformers reads the same key differently from model to model.

Shapes: B batch, T tokens, E hidden width, H query heads, G KV heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from pdtrim.kv.bias import KVBias, turn
from pdtrim.kv.selectors import SelectorBase

Rope = tuple[Tensor, Tensor]
"""cos and sin of the rotary angles, each ``[B, T, D]``."""

Made = Literal["queries", "keys", "values", "attention", "gate", "up", "mlp"]
"""What a projection makes; ``attention`` and ``mlp`` are what is added to the stream."""
UnitKind = Literal["group", "neuron"]
"""What is cut as one: a KV head with its query heads, or an MLP neuron."""
OUTPUTS: tuple[Made, Made] = ("attention", "mlp")
KEYS_AND_VALUES: tuple[Made, Made] = ("keys", "values")


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A matrix of a block.

    Attributes:
        name: of its module below the block.
        makes: what its rows give, in their order; several where a family fuses matrices.
        unit: what is cut out of it as one.
    """

    name: str
    makes: tuple[Made, ...]
    unit: UnitKind

    @property
    def writes(self) -> bool:
        """Whether it writes to the stream, so that a unit is columns of it; else it is rows."""
        return self.makes[0] in OUTPUTS


@dataclass(frozen=True, kw_only=True)
class Products:
    """Multiply-adds a token of a block's projections, by the part that needs them.

    Attributes:
        groups: KV heads.
        q_width: channels of all query heads; scores and mixing cost that many a key, each.
    """

    groups: int
    q_width: int
    kv: int
    qo: int
    mlp: int


def head_width(config: Any) -> int:
    """Channels of a head."""
    width = getattr(config, "head_dim", None)
    return int(width or config.hidden_size // config.num_attention_heads)


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

    PROJECTIONS: ClassVar[tuple[Projection, ...]] = (
        Projection(name="self_attn.q_proj", makes=("queries",), unit="group"),
        Projection(name="self_attn.k_proj", makes=("keys",), unit="group"),
        Projection(name="self_attn.v_proj", makes=("values",), unit="group"),
        Projection(name="self_attn.o_proj", makes=("attention",), unit="group"),
        Projection(name="mlp.gate_proj", makes=("gate",), unit="neuron"),
        Projection(name="mlp.up_proj", makes=("up",), unit="neuron"),
        Projection(name="mlp.down_proj", makes=("mlp",), unit="neuron"),
    )

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
        return self._heads("queries", "q_norm", h_BTE)

    def project_kv(self, h_BTE: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Rotated keys and values, each ``[B, G, T, D]``, of the normed stream."""
        k_BGTD = rotate(self._heads("keys", "k_norm", h_BTE), rope)
        return k_BGTD, self._heads("values", None, h_BTE)

    def kv_bias(self) -> KVBias | None:
        """What biases add to every key before the rotation, and to every value; None if nothing."""
        k, v = self.matrix("keys").bias, self.matrix("values").bias
        if not self.biases_every_key or k is None or v is None:
            return None
        D = self.attention.head_dim
        return KVBias(k_GD=k.detach().view(-1, D), v_GD=v.detach().view(-1, D))

    def project_output(self, o_BHTD: Tensor) -> Tensor:
        """What attention adds to the stream, ``[B, T, E]``."""
        return self.matrix("attention")(o_BHTD.transpose(1, 2).flatten(2))

    @property
    def mlp_norm(self) -> nn.Module:
        """The norm before the MLP."""
        norm: nn.Module = self.module.post_attention_layernorm
        return norm

    def mlp(self, x_BTE: Tensor) -> Tensor:
        """What the MLP adds to the stream, its norm included."""
        return self.module.mlp(self.mlp_norm(x_BTE))

    def _heads(self, made: Made, norm: str | None, h_BTE: Tensor) -> Tensor:
        """Project and split into heads; ``norm`` names a per-head norm that the family may have."""
        del norm
        x_BTF = self.matrix(made)(h_BTE)
        return x_BTF.unflatten(-1, (-1, self.attention.head_dim)).transpose(1, 2)

    @classmethod
    def making(cls, made: Made) -> Projection:
        """The projection that makes something."""
        return next(p for p in cls.PROJECTIONS if made in p.makes)

    def matrix(self, made: Made) -> nn.Linear:
        """The module of the projection that makes something."""
        found: Any = self.module.get_submodule(self.making(made).name)
        return found

    def parameters_of(self, *made: Made) -> dict[str, Tensor]:
        """Weights and biases of the projections that make these, by their names in the block."""
        names = tuple(f"{self.making(what).name}." for what in made)
        return {n: p.detach() for n, p in self.module.named_parameters() if n.startswith(names)}

    def span(self, made: Made) -> slice:
        """Rows of what is made in the matrix that makes it; columns where that one writes."""
        projection = self.making(made)
        matrix = self.matrix(made)
        total = matrix.in_features if projection.writes else matrix.out_features
        sizes = [self._unit_size(part) for part in projection.makes]
        at, count = projection.makes.index(made), total // sum(sizes)
        start = count * sum(sizes[:at])
        return slice(start, start + count * sizes[at])

    def units(self, projection: Projection) -> tuple[Tensor, ...]:
        """Channels of each unit, ``[units, channels]``, for each of what the projection makes.

        Channels are rows of the weight, or columns where the projection writes to the stream.
        """
        return tuple(
            torch.arange(span.start, span.stop).view(-1, self._unit_size(made))
            for made in projection.makes
            for span in (self.span(made),)
        )

    def _unit_size(self, made: Made) -> int:
        D: int = self.attention.head_dim
        heads: int = self.attention.num_key_value_groups
        sizes = {"queries": heads * D, "keys": D, "values": D, "attention": heads * D}
        return sizes.get(made, 1)

    @classmethod
    def products(cls, config: PreTrainedConfig, *, groups: int, neurons: int) -> Products:
        """Multiply-adds a token of a block of so many KV heads and neurons."""
        hidden, heads = config.hidden_size, config.num_attention_heads
        head_dim = head_width(config)
        q_width = groups * heads // config.num_key_value_heads * head_dim
        return Products(
            groups=groups,
            q_width=q_width,
            kv=2 * hidden * groups * head_dim,
            qo=2 * hidden * q_width,
            mlp=3 * hidden * neurons,
        )

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
