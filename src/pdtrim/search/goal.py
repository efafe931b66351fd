"""What each stage must lose, in blocks, parameters, operations, KV bytes or seconds.

Every unit of a stage has a saving, and a stage's goal is a needed sum of savings. Where all savings
are equal this is a count of blocks.

Shapes: U units of a stage, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

from pdtrim.kv.policy import HandoverPolicy
from pdtrim.models.model import Model
from pdtrim.plan import Gates, Mode, Stage
from pdtrim.search.state import Removal
from pdtrim.stage.cost import Lengths, block_parameters, stage_flops
from pdtrim.words import Grain

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
        return self.lacking(state.of(stage), stage)

    def lacking(self, units: Iterable[int], stage: Stage) -> float:
        """The same for a set of a stage's units."""
        savings, needed = self.savings(stage), self.needed(stage)
        missing = needed - math.fsum(savings[unit] for unit in units)
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

        A unit saves what the stage does less without it alone; in mode ``subset``, without it in
        both stages. Prefill work that nothing reads saves nothing; in mode ``projected`` an
        attention that prefill skips still makes keys and values. What a state really saves is
        never less than the sum, and more where both stages lose a unit.
        """
        num_layers = config.num_hidden_layers
        policy = policy or HandoverPolicy.full(num_layers)

        def cost(gates: Gates) -> dict[Stage, float]:
            prefill, decode = stage_flops(config, gates, policy, lengths)
            return {"prefill": prefill, "decode": decode}

        dense = Removal(num_layers=num_layers, mode=mode, grain=grain)
        return cls._shares(dense, cost, prefill_share=prefill_share, decode_share=decode_share)

    @classmethod
    def parameters(
        cls,
        model: Model,
        *,
        prefill_share: float = 0.0,
        decode_share: float = 0.0,
        grain: Grain = "block",
        mode: Mode = "projected",
        policy: HandoverPolicy | None = None,
    ) -> Goal:
        """Shares of the blocks' parameters in each stage's checkpoint.

        Units save as with :meth:`flops`; the shares are those that ``stage/cost.py:
        removed_parameters`` counts. In mode ``unified`` prefill has none: it loses what decode
        does, which may be a little more or less of what it holds, as it ends with the keys and
        values of its last block.

        Args:
            policy: its selectors may keep parameters of attentions that prefill skips.
        """
        rules = (policy or HandoverPolicy.full(model.num_layers)).rules

        def cost(gates: Gates) -> dict[Stage, float]:
            held = block_parameters(model, gates, rules)
            return {"prefill": float(held["prefill"]), "decode": float(held["decode"])}

        dense = Removal(num_layers=model.num_layers, mode=mode, grain=grain)
        return cls._shares(dense, cost, prefill_share=prefill_share, decode_share=decode_share)

    @classmethod
    def _shares(
        cls,
        dense: Removal,
        cost_of: Callable[[Gates], dict[Stage, float]],
        *,
        prefill_share: float,
        decode_share: float,
    ) -> Goal:
        """Shares of a cost that is known for each stage under any gates.

        What the cost is without any unit, such as that of the head, cannot be saved and is left
        out.
        """
        units = frozenset(range(dense.num_units))

        def cost(state: Removal) -> dict[Stage, float]:
            return cost_of(state.gates.without_dead_work())

        def saving(stage: Stage, unit: int) -> float:
            before = start = dense
            if stage == "prefill" and dense.mode == "subset":
                before = dense.remove("decode", unit)  # else prefill may not lose it
            if dense.grain == "part":
                start = before  # a part at the end takes others along, which count for themselves
            return cost(start)[stage] - cost(before.remove(stage, unit))[stage]

        whole, rest = cost(dense), cost(replace(dense, prefill=units, decode=units))
        return cls(
            prefill_U=tuple(saving("prefill", unit) for unit in sorted(units)),
            decode_U=tuple(saving("decode", unit) for unit in sorted(units)),
            prefill_needed=prefill_share * (whole["prefill"] - rest["prefill"]),
            decode_needed=decode_share * (whole["decode"] - rest["decode"]),
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
