"""The plan: which parts of a model each stage runs, and which of the prompt's KV cache travels.

A plan is one JSON file, schema ``pdtrim.plan/1``. Everything else in pdtrim either makes a plan or
obeys one. It is data only: nothing in it is ever executed.

Words: *layer* is a block's index in the dense model, *stage* is prefill or decode, a *gate* says
whether a stage runs a part of a block.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pdtrim.errors import PdtrimError, PlanError, border
from pdtrim.keep.document import Document
from pdtrim.kv.codecs import Codec, Raw
from pdtrim.kv.selectors import Full, Selector
from pdtrim.plan.gates import Gates
from pdtrim.plan.width import MAX_HEADS, Width, Widths
from pdtrim.records import Frozen
from pdtrim.words import STAGES, Mode, Stage

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_PLAN_BYTES = 16 * 2**20
MAX_LAYERS, MAX_HEAD_DIM = 4096, 4096
"""Far beyond any model; a plan that claims more is damaged, and must not cost memory."""

MAX_HELD_OUT = 100_000
"""Sequences of held-out text whose KL a plan keeps at most."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class LayerKV(Frozen):
    """Which prompt tokens of one layer travel, and in how many bits."""

    selector: Selector = Full()
    codec: Codec = Raw()

    @property
    def text(self) -> str:
        """The rule on one line, long parameters left out."""
        parts = []
        for record in (self.selector, self.codec):
            data = record.model_dump()
            name = data.pop("name")
            shown = ", ".join(f"{k} {v}" for k, v in data.items() if len(str(v)) < 30)
            parts.append(f"{name} ({shown})" if shown else name)
        return ", ".join(parts)


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


class HeldOutScore(Frozen):
    """What the finished pair costs on the re-rank text, nats a token above the dense model.

    Attributes:
        kl: KL of continuation tokens.
        recall: NLL of answers that need the prompt.
        kls: of each sequence, for a test of drift; empty in plans from before they were kept.
    """

    kl: float
    recall: float | None = None
    kls: tuple[float, ...] = Field(default=(), max_length=MAX_HELD_OUT)


class Provenance(Frozen):
    """How the plan came to be. It does not enter the digest: it changes nothing that runs.

    Attributes:
        search_kl, search_recall: of the blocks found, on the text that steered the search.
        recall_weight: of recall beside KL in what was minimised.
        held_out: of the finished pair; None in plans from before it was measured, and of pairs
            that were trained since.
    """

    method: str
    mode: Mode
    seed: int
    calibration: str
    calibration_hash: str
    search_block_tokens: int = Field(ge=0)
    search_kl: float | None = None
    search_recall: float | None = None
    recall_weight: float = 0.0
    held_out: HeldOutScore | None = None
    repair: str = "none"
    distillation: str = "none"
    wall_s: float = Field(default=0.0, ge=0)
    versions: dict[str, str] = Field(default_factory=dict)


class PrunePlan(Document):
    """A model, its gates, its KV policy, and where they came from.

    Attributes:
        kv: one rule a layer, for the prompt tokens that prefill hands over (all but the last).
        block_size: tokens in a page of the decode engine; kept runs round outward to it. The
            simulator rounds in the same way. 1 is token-exact.
        widths: None if all blocks are as wide as the dense model's. A KV head that decode keeps,
            prefill keeps too: decode reads its pairs of the prompt.
    """

    largest: ClassVar[int] = MAX_PLAN_BYTES
    kind: ClassVar[type[PdtrimError]] = PlanError

    schema_id: Literal["pdtrim.plan/1"] = Field(default="pdtrim.plan/1", alias="schema")
    model: BaseModelRef
    gates: Gates
    kv: tuple[LayerKV, ...]
    replacements: tuple[Replacement, ...] = ()
    block_size: int = Field(default=1, ge=1, le=1024)
    widths: Widths | None = None
    provenance: Provenance

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
            if selector.numbers_heads and kept < self.model.num_kv_heads:
                raise ValueError(
                    f"layer {layer}: '{selector.name}' numbers all {self.model.num_kv_heads} KV"
                    f" heads, but decode keeps {kept}: use another selector there"
                )

    def width(self, stage: Stage, layer: int) -> Width | None:
        """The width of a layer in a stage; None is a whole block."""
        return self.widths.of(stage)[layer] if self.widths else None

    def whole_blocks(self, stage: Stage) -> int:
        """Blocks that a stage runs as the dense model has them: both gates open, none narrower."""
        return sum(
            attention in ("full", True) and mlp and self.width(stage, layer) is None
            for layer, (attention, mlp) in enumerate(zip(*self.gates.of(stage), strict=True))
        )

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

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a plan file.

        Raises:
            PlanError: missing, too large, not JSON, unknown keys, or an invalid plan.
        """
        with border(PlanError, f"cannot read {path}"):
            if not Path(path).is_file():
                raise PlanError(f"no plan file at {path}")
        return super().load(path)
