"""What each stage must lose, in blocks, operations, KV bytes or seconds.

Every unit of a stage has a saving, and a stage's goal is a needed sum of savings. Where all savings
are equal this is a count of blocks.

Shapes: U units of a stage, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

from pdtrim.kv.policy import HandoverPolicy
from pdtrim.plan import Mode, Stage
from pdtrim.search.state import Grain, Removal
from pdtrim.stage.cost import Lengths, stage_flops

SEARCH_ORDER: tuple[Stage, ...] = ("decode", "prefill")
"""Decode first: it is the sensitive stage, and in mode ``subset`` prefill's set lies in its."""

ROUNDING = 1e-9  # a sum of savings this near to what is needed, relative to it, meets it


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Savings of each unit, and the sums of them that are needed, in any one measure a stage."""

    prefill_U: tuple[float, ...]
    decode_U: tuple[float, ...]
    prefill_needed: float = 0.0
    decode_needed: float = 0.0

    def savings(self, stage: Stage) -> tuple[float, ...]:
        """What each unit of a stage saves."""
        return self.prefill_U if stage == "prefill" else self.decode_U

    def needed(self, stage: Stage) -> float:
        """What a stage must save."""
        return self.prefill_needed if stage == "prefill" else self.decode_needed

    def missing(self, state: Removal, stage: Stage) -> float:
        """What a stage must still save; 0 where the goal is reached."""
        savings, needed = self.savings(stage), self.needed(stage)
        missing = needed - math.fsum(savings[unit] for unit in state.of(stage))
        return missing if missing > ROUNDING * needed else 0.0

    def met(self, state: Removal) -> bool:
        """Whether both stages save what they must."""
        return not any(self.missing(state, stage) for stage in SEARCH_ORDER)

    def useful(self, state: Removal, stage: Stage) -> list[int]:
        """Units that the stage may lose next and that save something."""
        savings = self.savings(stage)
        return [unit for unit in state.removable(stage) if savings[unit] > 0]

    def redundant(self, state: Removal, stage: Stage) -> list[int]:
        """Units that the stage may take back while it still saves what it must."""
        return [
            unit
            for unit in state.restorable(stage)
            if not self.missing(state.restore(stage, unit), stage)
        ]

    def price(self, state: Removal, stage: Stage, unit: int, harm: float) -> float:
        """Harm a unit of saving; what a removal saves beyond the goal counts for nothing."""
        return harm / min(self.savings(stage)[unit], self.missing(state, stage))

    def trim(self, state: Removal, stage: Stage, order: Sequence[int]) -> Removal:
        """Take back what the goal can do without, tried in the order given."""
        for unit in order:
            if unit in self.redundant(state, stage):
                state = state.restore(stage, unit)
        return state

    def least(self, stage: Stage) -> int:
        """The fewest removals that can reach the stage's goal."""
        left, count = self.needed(stage), 0
        for saving in sorted(self.savings(stage), reverse=True):
            if left <= ROUNDING * self.needed(stage) or saving <= 0:
                break
            left, count = left - saving, count + 1
        return count

    @classmethod
    def blocks(
        cls,
        num_layers: int,
        *,
        prefill: int = 0,
        decode: int = 0,
        grain: Grain = "block",
        attention: float = 0.5,
    ) -> Goal:
        """A count of blocks a stage.

        Args:
            attention: the share of a block that its attention is, for grain ``part``; see
                :func:`attention_share`. The MLP is the rest.
        """
        unit_U = (1.0,) if grain == "block" else (attention, 1 - attention)
        return cls(
            prefill_U=unit_U * num_layers,
            decode_U=unit_U * num_layers,
            prefill_needed=prefill,
            decode_needed=decode,
        )

    @classmethod
    def flops(
        cls,
        config: PreTrainedConfig,
        lengths: Lengths,
        *,
        prefill_share: float = 0.0,
        decode_share: float = 0.0,
        grain: Grain = "block",
        mode: Mode = "projected",
        policy: HandoverPolicy | None = None,
    ) -> Goal:
        """Shares of each stage's operations in blocks, the head left out.

        A unit saves what the stage does less without it alone. Prefill work that nothing reads
        saves nothing; in mode ``projected`` an attention that prefill skips still makes keys and
        values. What a state really saves is never less than the sum, and more where both stages
        lose a unit.
        """
        num_layers = config.num_hidden_layers
        policy = policy or HandoverPolicy.full(num_layers)
        dense = Removal(num_layers=num_layers, mode=mode, grain=grain)

        def cost(state: Removal) -> dict[Stage, float]:
            gates = state.gates.without_dead_work()
            prefill, decode = stage_flops(config, gates, policy, lengths)
            return {"prefill": prefill, "decode": decode}

        def saving(stage: Stage, unit: int) -> float:
            before = dense
            if stage == "prefill" and mode == "subset":
                before = dense.remove("decode", unit)  # else prefill may not lose it
            return cost(before)[stage] - cost(before.remove(stage, unit))[stage]

        units = frozenset(range(dense.num_units))
        nothing = Removal(
            num_layers=num_layers, mode=mode, grain=grain, prefill=units, decode=units
        )
        whole, head = cost(dense), cost(nothing)
        return cls(
            prefill_U=tuple(saving("prefill", unit) for unit in range(dense.num_units)),
            decode_U=tuple(saving("decode", unit) for unit in range(dense.num_units)),
            prefill_needed=prefill_share * (whole["prefill"] - head["prefill"]),
            decode_needed=decode_share * (whole["decode"] - head["decode"]),
        )

    @classmethod
    def kv_bytes(cls, bytes_L: Sequence[float], *, share: float, grain: Grain = "block") -> Goal:
        """A share of the handover's bytes; only attentions that decode loses save any.

        Args:
            bytes_L: what each layer sends of a prompt under its KV rule.
        """
        part = (1.0,) if grain == "block" else (1.0, 0.0)
        decode_U = tuple(size * weight for size in bytes_L for weight in part)
        return cls(
            prefill_U=(0.0,) * len(decode_U),
            decode_U=decode_U,
            decode_needed=share * math.fsum(bytes_L),
        )

    @classmethod
    def latency(
        cls,
        seconds: Mapping[Stage, Sequence[float]],
        *,
        prefill_share: float = 0.0,
        decode_share: float = 0.0,
    ) -> Goal:
        """Shares of the time that each stage's blocks take.

        Args:
            seconds: of each unit, as ``search/latency.py`` measures.
        """
        return cls(
            prefill_U=tuple(seconds["prefill"]),
            decode_U=tuple(seconds["decode"]),
            prefill_needed=prefill_share * math.fsum(seconds["prefill"]),
            decode_needed=decode_share * math.fsum(seconds["decode"]),
        )


def attention_share(config: PreTrainedConfig, lengths: Lengths) -> float:
    """The share of a dense block's matrix-product operations, both stages, that attention is."""
    num_layers = config.num_hidden_layers
    policy = HandoverPolicy.full(num_layers)

    def cost(units: range) -> float:
        gone = frozenset(units)
        state = Removal(
            num_layers=num_layers, mode="subset", grain="part", prefill=gone, decode=gone
        )
        return sum(stage_flops(config, state.gates, policy, lengths))

    whole, nothing = cost(range(0)), cost(range(2 * num_layers))
    return (whole - cost(range(0, 2 * num_layers, 2))) / (whole - nothing)
