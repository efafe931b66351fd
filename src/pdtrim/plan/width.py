"""Widths: what a stage keeps of a block that was made narrower."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from pydantic import Field, field_validator

from pdtrim.records import Frozen
from pdtrim.words import Stage

MAX_HEADS, MAX_NEURONS = 4096, 2**20
"""Far beyond any model; a plan that claims more is damaged, and must not cost memory."""


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
