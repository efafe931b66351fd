"""The plan: which parts of a model each stage runs, and which of the prompt's KV cache travels.

A plan is one JSON file, schema ``pdtrim.plan/1``. Everything else in pdtrim either makes a plan or
obeys one. It is data only: nothing in it is ever executed.

Words: *layer* is a block's index in the dense model, *stage* is prefill or decode, a *gate* says
whether a stage runs a part of a block.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from pdtrim.errors import PlanError, border
from pdtrim.keep.files import write_json
from pdtrim.kv.codecs import Codec, Raw
from pdtrim.kv.selectors import Duo, Full, Gate, Selector
from pdtrim.reading.json_text import read_json
from pdtrim.records import Frozen, first_problem

MAX_PLAN_BYTES = 16 * 2**20
MAX_LAYERS, MAX_HEADS, MAX_HEAD_DIM, MAX_NEURONS = 4096, 4096, 4096, 2**20
"""Far beyond any model; a plan that claims more is damaged, and must not cost memory."""

Stage = Literal["prefill", "decode"]
AttentionGate = Literal["full", "kv", "off"]
Mode = Literal["projected", "subset", "unified"]
STAGES: tuple[Stage, ...] = ("prefill", "decode")
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Gates(Frozen):
    """What each stage runs, one entry a layer.

    ``prefill_attention`` is ``"full"`` (run it), ``"kv"`` (skip it, but still compute the keys and
    values of the residual stream that reaches it) or ``"off"``. The other three are on or off.

    Raises:
        ValueError: lengths differ, or decode runs an attention for which prefill makes no KV.
    """

    prefill_attention: tuple[AttentionGate, ...]
    prefill_mlp: tuple[bool, ...]
    decode_attention: tuple[bool, ...]
    decode_mlp: tuple[bool, ...]

    @model_validator(mode="after")
    def _check(self) -> Gates:
        lengths = {
            len(self.prefill_attention),
            len(self.prefill_mlp),
            len(self.decode_attention),
            len(self.decode_mlp),
        }
        if len(lengths) != 1:
            raise ValueError(f"gates of lengths {sorted(lengths)}: give one entry a layer")
        for layer, (prefill, decode) in enumerate(
            zip(self.prefill_attention, self.decode_attention, strict=True)
        ):
            if decode and prefill == "off":
                raise ValueError(
                    f"layer {layer}: decode runs its attention but prefill makes no keys and values"
                    " for it; set prefill to 'full' or 'kv', or remove it from decode too"
                )
        return self

    @property
    def num_layers(self) -> int:
        """Layers of the dense model."""
        return len(self.decode_mlp)

    @classmethod
    def dense(cls, num_layers: int) -> Gates:
        """Everything runs."""
        return cls.removing(num_layers)

    @classmethod
    def removing(
        cls,
        num_layers: int,
        *,
        prefill: Iterable[int] = (),
        decode: Iterable[int] = (),
        mode: Mode = "projected",
    ) -> Gates:
        """Gates without the whole blocks named, a set for each stage.

        A block that only prefill loses keeps its KV projection in mode ``projected`` and is an
        error in mode ``subset`` (the paper's rule: prefill's set lies inside decode's). In mode
        ``unified`` the stages lose the same blocks.
        """
        gone_prefill, gone_decode = set(prefill), set(decode)
        for layer in gone_prefill | gone_decode:
            if not 0 <= layer < num_layers:
                raise PlanError(f"layer {layer} does not exist: the model has {num_layers}")
        extra = sorted(gone_prefill - gone_decode)
        if mode == "subset" and extra:
            raise PlanError(
                f"mode 'subset': prefill removes {extra}, which decode keeps; remove them from"
                " decode too, or use mode 'projected'"
            )
        if mode == "unified" and gone_prefill != gone_decode:
            raise PlanError("mode 'unified': both stages lose the same blocks")
        layers = range(num_layers)
        return cls(
            prefill_attention=tuple(
                "full" if i not in gone_prefill else "off" if i in gone_decode else "kv"
                for i in layers
            ),
            prefill_mlp=tuple(i not in gone_prefill for i in layers),
            decode_attention=tuple(i not in gone_decode for i in layers),
            decode_mlp=tuple(i not in gone_decode for i in layers),
        )

    def blocks(self, stage: Stage) -> int:
        """Blocks whose attention and MLP the stage still runs."""
        return sum(
            attention in ("full", True) and mlp
            for attention, mlp in zip(*self.of(stage), strict=True)
        )

    def of(self, stage: Stage) -> tuple[tuple[AttentionGate | bool, ...], tuple[bool, ...]]:
        """The (attention, MLP) gates of one stage."""
        if stage == "prefill":
            return self.prefill_attention, self.prefill_mlp
        return self.decode_attention, self.decode_mlp

    def layers(self, stage: Stage) -> tuple[int, ...]:
        """Layers of which the stage runs anything at all: the slots of its checkpoint, in order."""
        attention, mlp = self.of(stage)
        return tuple(
            i for i in range(self.num_layers) if attention[i] in ("full", "kv", True) or mlp[i]
        )

    @property
    def last_read(self) -> int:
        """The last layer whose prompt KV decode reads, -1 if none; prefill ends with it."""
        return max((i for i, on in enumerate(self.decode_attention) if on), default=-1)

    def without_dead_work(self) -> Gates:
        """The same function of the prompt with the prefill work that nothing reads removed. Exact.

        Decode reads only prompt KV, so behind the K and V of the last layer that decode reads,
        prefill has nothing left to do.
        """
        last = self.last_read
        attention = tuple(
            gate if i < last else "kv" if i == last else "off"
            for i, gate in enumerate(self.prefill_attention)
        )
        mlp = tuple(on and i < last for i, on in enumerate(self.prefill_mlp))
        return self.model_copy(update={"prefill_attention": attention, "prefill_mlp": mlp})


class Width(Frozen):
    """What a stage keeps of one block; the rest is cut out of its weights.

    Attributes:
        groups: KV heads by their dense index, ascending, each with all the query heads that read
            it.
        neurons: of the MLP, as a hexadecimal mask; its first bit is neuron 0.
        biased: both output projections have a bias; its values are in the block's replacement.
    """

    groups: tuple[int, ...] = Field(min_length=1, max_length=MAX_HEADS)
    neurons: str = Field(pattern=r"^[0-9a-f]*[1-9a-f][0-9a-f]*$", max_length=MAX_NEURONS // 4)
    biased: bool = False

    @field_validator("groups")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if value[0] < 0 or any(a >= b for a, b in pairwise(value)):
            raise ValueError("must be ascending head numbers, each once")
        return value

    @classmethod
    def of(
        cls,
        *,
        groups: Iterable[int],
        neurons: Iterable[int],
        num_neurons: int,
        biased: bool = False,
    ) -> Width:
        """From indices; ``num_neurons`` is the dense MLP's width."""
        bits = ["0"] * (-(-num_neurons // 4) * 4)
        for neuron in neurons:
            bits[neuron] = "1"
        digits = ("".join(bits[i : i + 4]) for i in range(0, len(bits), 4))
        mask = "".join(f"{int(digit, 2):x}" for digit in digits)
        return cls(groups=tuple(sorted(groups)), neurons=mask, biased=biased)

    @property
    def kept_neurons(self) -> tuple[int, ...]:
        """Indices of the neurons that stay, ascending."""
        bits = "".join(f"{int(digit, 16):04b}" for digit in self.neurons)
        return tuple(i for i, bit in enumerate(bits) if bit == "1")


class Widths(Frozen):
    """The width of each layer in each stage; None is a whole block."""

    prefill: tuple[Width | None, ...]
    decode: tuple[Width | None, ...]

    def of(self, stage: Stage) -> tuple[Width | None, ...]:
        """One stage's."""
        return self.prefill if stage == "prefill" else self.decode


class LayerKV(Frozen):
    """Which prompt tokens of one layer travel, and in how many bits."""

    selector: Selector = Full()
    codec: Codec = Raw()


class BaseModelRef(Frozen):
    """The dense model that a plan was made for."""

    name: str
    revision: str | None = None
    family: str
    num_layers: int = Field(gt=0, le=MAX_LAYERS)
    num_kv_heads: int = Field(gt=0, le=MAX_HEADS)
    head_dim: int = Field(gt=0, le=MAX_HEAD_DIM)
    fingerprint: Sha256


class Replacement(Frozen):
    """Other weights for a block that a stage runs.

    Attributes:
        layer: where it stands; parameters that its file leaves out are the dense model's.
        merged: the layers whose work it does.
        weights: its safetensors file, relative to the plan file's folder.
    """

    stage: Stage
    layer: int = Field(ge=0, lt=MAX_LAYERS)
    merged: tuple[int, ...] = Field(max_length=MAX_LAYERS)
    weights: str
    sha256: Sha256

    @field_validator("weights")
    @classmethod
    def _relative(cls, value: str) -> str:
        path = PurePosixPath(value)
        if path.is_absolute() or ".." in path.parts or not value.endswith(".safetensors"):
            raise ValueError("must be a relative .safetensors path below the plan's folder")
        return value


class Provenance(Frozen):
    """How the plan came to be. It does not enter the digest: it changes nothing that runs."""

    method: str
    mode: Mode
    seed: int
    calibration: str
    calibration_hash: str
    search_block_tokens: int = Field(ge=0)
    search_kl: float | None = None
    repair: str = "none"
    distillation: str = "none"
    wall_s: float = Field(default=0.0, ge=0)
    versions: dict[str, str] = Field(default_factory=dict)


class PrunePlan(Frozen):
    """A model, its gates, its KV policy, and where they came from.

    Attributes:
        kv: one rule a layer, for the prompt tokens that prefill hands over (all but the last).
        block_size: tokens in a page of the decode engine; kept runs round outward to it. The
            simulator rounds in the same way. 1 is token-exact.
        widths: None if all blocks are as wide as the dense model's. A KV head that decode keeps,
            prefill keeps too: decode reads its pairs of the prompt.
    """

    schema_id: Literal["pdtrim.plan/1"] = Field(default="pdtrim.plan/1", alias="schema")
    model: BaseModelRef
    gates: Gates
    kv: tuple[LayerKV, ...]
    replacements: tuple[Replacement, ...] = ()
    block_size: int = Field(default=1, ge=1, le=1024)
    widths: Widths | None = None
    provenance: Provenance

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_by_name=True, validate_by_alias=True
    )

    @model_validator(mode="after")
    def _check(self) -> PrunePlan:
        for name, count in (("gates", self.gates.num_layers), ("kv", len(self.kv))):
            if count != self.model.num_layers:
                raise ValueError(
                    f"{name} has {count} entries but the model has {self.model.num_layers} layers"
                )
        for item in self.replacements:
            if any(not 0 <= i < self.model.num_layers for i in (item.layer, *item.merged)):
                raise ValueError(f"replacement at {item.layer} names a layer that does not exist")
            if item.layer not in self.gates.layers(item.stage):
                raise ValueError(
                    f"replacement at {item.layer}: {item.stage} runs nothing of that layer"
                )
        places = [(item.stage, item.layer) for item in self.replacements]
        if len(set(places)) != len(places):
            raise ValueError("two replacements for one layer of a stage: give at most one")
        self._check_widths()
        return self

    def _check_widths(self) -> None:
        if self.widths is None:
            return
        for stage in STAGES:
            count = len(self.widths.of(stage))
            if count != self.model.num_layers:
                raise ValueError(
                    f"{stage} widths has {count} entries but the model has"
                    f" {self.model.num_layers} layers"
                )
            for layer in range(self.model.num_layers):
                width = self.width(stage, layer)
                if width and width.groups[-1] >= self.model.num_kv_heads:
                    raise ValueError(
                        f"{stage} keeps KV head {width.groups[-1]} of layer {layer}, which does not"
                        " exist"
                    )
        for layer in self.sent_layers:
            extra = set(self.kv_heads("decode", layer)) - set(self.kv_heads("prefill", layer))
            if extra:
                raise ValueError(
                    f"layer {layer}: decode keeps KV heads {sorted(extra)}, which prefill lost;"
                    " keep them in prefill too"
                )
            selector, kept = self.kv[layer].selector, len(self.kv_heads("decode", layer))
            if isinstance(selector, Duo | Gate) and kept < self.model.num_kv_heads:
                raise ValueError(
                    f"layer {layer}: '{selector.name}' numbers all {self.model.num_kv_heads} KV"
                    f" heads, but decode keeps {kept}: use another selector there"
                )

    def width(self, stage: Stage, layer: int) -> Width | None:
        """The width of a layer in a stage; None is a whole block."""
        return self.widths.of(stage)[layer] if self.widths else None

    def kv_heads(self, stage: Stage, layer: int) -> tuple[int, ...]:
        """Dense indices of the KV heads that a stage keeps of a layer."""
        width = self.width(stage, layer)
        return width.groups if width else tuple(range(self.model.num_kv_heads))

    def sent_places(self, layer: int) -> tuple[int, ...]:
        """Which of the heads that prefill keeps of a layer are sent: those that decode keeps."""
        kept = self.kv_heads("prefill", layer)
        return tuple(kept.index(head) for head in self.kv_heads("decode", layer))

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of everything that changes what runs; both checkpoints carry it."""
        data = self.model_dump(mode="json", by_alias=True, exclude={"provenance"})
        data["model"] = {"fingerprint": self.model.fingerprint}
        if data["widths"] is None:
            del data["widths"]  # so that plans from before there were widths keep their digest
        for item in data["replacements"]:
            del item["weights"]  # where a file lies changes nothing; its hash says what is in it
        text = json.dumps(data, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def sent_layers(self) -> tuple[int, ...]:
        """Layers whose prompt KV travels, in wire order."""
        return tuple(i for i, on in enumerate(self.gates.decode_attention) if on)

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dump``."""
        return self.model_dump(mode="json", by_alias=True)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> PrunePlan:
        """Read a plan file.

        Raises:
            PlanError: missing, too large, not JSON, unknown keys, or an invalid plan.
        """
        with border(PlanError, f"cannot read {path}"):
            if not Path(path).is_file():
                raise PlanError(f"no plan file at {path}")
        data = read_json(path, limit=MAX_PLAN_BYTES, kind=PlanError)
        return cls.from_json(data, source=str(path))

    @classmethod
    def from_json(cls, data: Any, *, source: str = "plan") -> PrunePlan:
        """Validate plain data; ``source`` names it in the error."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise PlanError(f"{source}: {first_problem(error)}") from error
