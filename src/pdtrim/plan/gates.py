"""Gates: which parts of each block a stage runs.

*Layer* is a block's index in the dense model, *stage* is prefill or decode.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import Literal

from pydantic import model_validator

from pdtrim.errors import PlanError
from pdtrim.records import Frozen
from pdtrim.words import Mode, Stage

AttentionGate = Literal["full", "kv", "off"]


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
        gone = gone_prefill, gone_decode
        return cls.without(num_layers, attention=gone, mlp=gone)

    @classmethod
    def without(
        cls,
        num_layers: int,
        *,
        attention: tuple[Set[int], Set[int]],
        mlp: tuple[Set[int], Set[int]],
    ) -> Gates:
        """Gates without some attentions and MLPs, each by layer, of prefill and of decode.

        Prefill still makes keys and values for an attention that only it loses.
        """
        layers = range(num_layers)
        return cls(
            prefill_attention=tuple(
                "full" if i not in attention[0] else "off" if i in attention[1] else "kv"
                for i in layers
            ),
            prefill_mlp=tuple(i not in mlp[0] for i in layers),
            decode_attention=tuple(i not in attention[1] for i in layers),
            decode_mlp=tuple(i not in mlp[1] for i in layers),
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
