"""``flap+pdtrim``: FLAP cuts what both stages lose, the search what one of them loses beyond.

What both stages lose alike goes in the heads and neurons that fluctuate least (FLAP, 2312.11983),
finer than whole blocks can be; what prefill loses more, or decode, goes in blocks, which that stage
alone skips. FLAP makes up for the mean of what it cut. The repair ``outputs`` then fits all that
is left of the output projections, and starts from FLAP's biases. See ``narrowed.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdtrim.methods.baselines.flap import FLAP
from pdtrim.methods.baselines.width import WidthMethod
from pdtrim.methods.narrowed import NarrowedPDTrim


@dataclass(frozen=True, kw_only=True)
class FLAPPDTrim(NarrowedPDTrim):
    """Settings are those of ``pdtrim``, and the part of the share that FLAP takes."""

    name = "flap+pdtrim"
    narrow: float = 1.0

    def narrower(self) -> WidthMethod:
        """FLAP with its biases."""
        return FLAP()
