"""``wanda-sp+pdtrim``: Wanda-SP cuts what both stages lose, the search what one loses beyond.

What both stages lose alike goes in the heads and neurons that give least to the output of their
projection, the same share of every block (Wanda-SP, in FLAP, 2312.11983); what prefill loses more,
or decode, goes in blocks, which that stage alone skips. Wanda-SP makes up for nothing that it cut;
the repair ``outputs`` fits what is left of the output projections. See ``narrowed.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdtrim.methods.baselines.wanda_sp import WandaSP
from pdtrim.methods.baselines.width import WidthMethod
from pdtrim.methods.narrowed import NarrowedPDTrim


@dataclass(frozen=True, kw_only=True)
class WandaSPPDTrim(NarrowedPDTrim):
    """Settings are those of ``pdtrim``, and the part of the share that Wanda-SP takes."""

    name = "wanda-sp+pdtrim"
    narrow: float = 1.0

    def narrower(self) -> WidthMethod:
        """Wanda-SP, which has no settings."""
        return WandaSP()
