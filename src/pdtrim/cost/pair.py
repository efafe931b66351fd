"""What a plan says of costs, read without torch: gates, how many tokens travel, and in what codec.

``pdtrim.plan`` checks a plan in full and needs the codecs and selectors themselves. Here only the
fields that costs depend on are read; the two agree on a plan that ``pdtrim plan`` wrote.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from pdtrim.errors import PlanError
from pdtrim.reading.json_text import read_json
from pdtrim.records import Part, first_problem, shortened

MAX_BYTES = 32 * 2**20
DEFAULTS: dict[str, dict[str, Any]] = {
    "int": {"group": 64, "first": 4, "recent": 32, "rotate": False},
    "entropy": {"k_step": 0.4, "v_step": 0.9, "first": 4},
}
"""Parameters of a codec that its short name leaves out."""


class _Gates(Part):
    prefill_attention: tuple[Literal["full", "kv", "off"], ...] = Field(max_length=4096)
    prefill_mlp: tuple[bool, ...]
    decode_attention: tuple[bool, ...]
    decode_mlp: tuple[bool, ...]


class _Rule(Part):
    selector: dict[str, Any] = Field(default_factory=lambda: {"name": "full"})
    codec: dict[str, Any] = Field(default_factory=lambda: {"name": "raw"})


class _Model(Part):
    name: str
    num_layers: int = Field(gt=0, le=4096)
    num_kv_heads: int = Field(gt=0, le=4096)
    head_dim: int = Field(gt=0, le=4096)


class _Made(Part):
    wall_s: float = Field(default=0.0, ge=0)


class _Plan(Part):
    schema_id: Literal["pdtrim.plan/1"] = Field(alias="schema")
    model: _Model
    gates: _Gates
    kv: tuple[_Rule, ...]
    widths: Any = None
    provenance: _Made = _Made()

    @model_validator(mode="after")
    def _check(self) -> _Plan:
        gates = self.gates
        parts = (*(getattr(gates, name) for name in _Gates.model_fields), self.kv)
        if any(len(part) != self.model.num_layers for part in parts):
            raise ValueError("gates and kv need one entry a layer")
        return self


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What of a layer's prompt KV travels.

    Attributes:
        codec: its short name, as ``pdtrim bench-codec`` writes it.
        share: of the prompt's tokens; None is ``first + last`` of them.
    """

    codec: str
    share: float | None
    ends: int = 0

    def kept(self, tokens: float) -> float:
        """Tokens that travel of a prompt."""
        return min(tokens, self.ends) if self.share is None else self.share * tokens


@dataclass(frozen=True, kw_only=True)
class PairCost:
    """What costs depend on in a pair.

    Attributes:
        attention, kv_only, mlp: how many layers of prefill run their whole attention, only its
            keys and values, and their MLP.
        decode_attention, decode_mlp: how many layers of decode run them.
        sent: one entry a layer that travels.
        search_s: seconds that the plan's search took, by the plan.
    """

    source: str
    layers: int
    attention: int
    kv_only: int
    mlp: int
    decode_attention: int
    decode_mlp: int
    sent: tuple[Sent, ...]
    search_s: float = 0.0
    model: str = ""
    kv_heads: int | None = None
    head_dim: int | None = None

    @classmethod
    def dense(cls, layers: int) -> PairCost:
        """The whole model in both stages, its whole cache sent as it is."""
        return cls(
            source="the dense model",
            layers=layers,
            attention=layers,
            kv_only=0,
            mlp=layers,
            decode_attention=layers,
            decode_mlp=layers,
            sent=(Sent(codec="raw", share=1.0),) * layers,
        )

    @property
    def whole(self) -> bool:
        """Whether both stages run all of the model."""
        parts = (self.attention, self.mlp, self.decode_attention, self.decode_mlp)
        return all(count == self.layers for count in parts)


def read_pair(path: str | Path) -> PairCost:
    """Of a plan file, or of an exported pair's folder.

    Raises:
        PlanError: neither of them, a damaged one, or one whose costs are not modelled.
    """
    path = Path(path)
    if path.is_dir():
        plans = [_stage_plan(path / stage / "config.json") for stage in ("prefill", "decode")]
        if plans[0] != plans[1]:
            raise PlanError(f"{path}: prefill and decode hold different plans: export again")
        data = plans[0]
    else:
        data = read_json(path, limit=MAX_BYTES, kind=PlanError)
    try:
        plan = _Plan.model_validate(data)
    except ValidationError as error:
        raise PlanError(f"{path}: {first_problem(error)}") from error
    if plan.widths is not None:
        raise PlanError(f"{path} has narrower blocks, whose stage times are not modelled")
    return _pair_of(plan, str(path))


def _stage_plan(config: Path) -> Any:
    data = read_json(config, limit=MAX_BYTES, kind=PlanError)
    entry = data.get("pdtrim") if isinstance(data, dict) else None
    if not isinstance(entry, dict) or "plan" not in entry:
        raise PlanError(f"{config} was not exported by pdtrim: give a plan or a pair's folder")
    return entry["plan"]


def _pair_of(plan: _Plan, source: str) -> PairCost:
    gates, layers = plan.gates, range(plan.model.num_layers)
    read = _last_read(gates)
    prefill = [layer for layer in layers if layer <= read]
    full = [i for i in prefill if gates.prefill_attention[i] == "full" and i < read]
    return PairCost(
        source=source,
        layers=plan.model.num_layers,
        attention=len(full),
        kv_only=sum(
            i not in full and gates.prefill_attention[i] != "off" and gates.decode_attention[i]
            for i in prefill
        ),
        mlp=sum(gates.prefill_mlp[i] for i in prefill if i < read),
        decode_attention=sum(gates.decode_attention),
        decode_mlp=sum(gates.decode_mlp),
        sent=tuple(
            _sent(rule, f"{source}: layer {i}")
            for i, rule in enumerate(plan.kv)
            if gates.decode_attention[i]
        ),
        search_s=plan.provenance.wall_s,
        model=plan.model.name,
        kv_heads=plan.model.num_kv_heads,
        head_dim=plan.model.head_dim,
    )


def _last_read(gates: _Gates) -> int:
    """The last layer whose keys and values decode reads; prefill needs nothing behind them."""
    return max((i for i, on in enumerate(gates.decode_attention) if on), default=-1)


def _sent(rule: _Rule, where: str) -> Sent:
    selector, codec = rule.selector, codec_name(rule.codec, where)
    name = selector.get("name")
    if name == "full":
        return Sent(codec=codec, share=1.0)
    if name == "first_last":
        ends = [selector.get(key) for key in ("first", "last")]
        counts = [end for end in ends if isinstance(end, int) and end >= 0]
        if len(counts) == len(ends):
            return Sent(codec=codec, share=None, ends=sum(counts))
    share = selector.get("share")
    if isinstance(share, int | float) and 0 < share <= 1:
        return Sent(codec=codec, share=float(share))
    raise PlanError(
        f"{where}: how much selector '{shortened(str(name))}' sends is not known before it runs:"
        " give --kv-bytes-per-token"
    )


def codec_name(codec: dict[str, Any], where: str) -> str:
    """A codec's short name, such as ``k3v2:rotate=true``."""
    name = str(codec.get("name"))
    if name in ("raw", "fp8", "lossless"):
        return name
    if name not in DEFAULTS:
        raise PlanError(f"{where}: unknown codec '{shortened(name)}'")
    bits, short = (codec.get("k_bits"), codec.get("v_bits")), name
    if name == "int":
        short = f"int{bits[0]}" if bits[0] == bits[1] else f"k{bits[0]}v{bits[1]}"
    options = [
        f"{key}={str(value).lower()}"
        for key, value in sorted(codec.items())
        if key not in ("name", "k_bits", "v_bits") and value != DEFAULTS[name].get(key)
    ]
    return ":".join([short, ",".join(options)]) if options else short
