"""How tokens are drawn. No torch here: the options of ``generate`` are made of this record."""

from __future__ import annotations

from dataclasses import dataclass

from pdtrim.errors import PdtrimError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: what logits are divided by, 0 to 10; 0 is greedy.
        top_p: the share of probability that is drawn from, the likeliest tokens first (the nucleus
            of arXiv 1904.09751); above 0, up to 1.
        seed: of the first prompt's draws; each further prompt has the next number.

    Raises:
        PdtrimError: a value of another type, or out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for what in ("temperature", "top_p"):
            value = getattr(self, what)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise PdtrimError(f"{what} must be a number, not {type(value).__name__}")
        if not 0.0 <= self.temperature <= 10.0:
            raise PdtrimError(f"temperature {_short(self.temperature)} must lie in 0 .. 10")
        if not 0.0 < self.top_p <= 1.0:
            raise PdtrimError(f"top_p {_short(self.top_p)} must lie in (0, 1]")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise PdtrimError(f"seed must be a whole number, not {type(self.seed).__name__}")
        if not 0 <= self.seed < 2**63:
            raise PdtrimError("seed must lie in 0 .. 2^63 - 1")


def _short(value: float) -> str:
    """Of a whole number of thousands of digits, no digit."""
    return f"{value:g}" if isinstance(value, float) or abs(value) < 1e15 else "of that size"
