"""What a pruned pair is judged by: KL on text, and what it lost of recall."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Score:
    """Two numbers and what the second weighs.

    Attributes:
        kl: KL to the dense model, nats a continuation token.
        recall: what answers lost (``calibration/recall.py``), nats a token; None where it is not
            measured.
        weight: of recall in the loss.
        kls: of each sequence, where they are kept.
    """

    kl: float
    recall: float | None = None
    weight: float = 0.0
    kls: tuple[float, ...] = ()

    @property
    def loss(self) -> float:
        """What is minimised."""
        return self.kl + self.weight * (self.recall or 0.0)
