"""``llm-pruner+pdtrim``: LLM-Pruner makes the blocks narrower, the search removes some of them.

Half of what both stages lose is cut by LLM-Pruner's units (2305.11627); see ``narrowed.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdtrim.methods.baselines.llm_pruner import LLMPruner
from pdtrim.methods.baselines.width import WidthMethod
from pdtrim.methods.narrowed import NarrowedPDTrim


@dataclass(frozen=True, kw_only=True)
class LLMPrunerPDTrim(NarrowedPDTrim):
    """Settings are those of ``pdtrim``, and the part of the share that LLM-Pruner takes."""

    name = "llm-pruner+pdtrim"
    narrow: float = 0.5

    def narrower(self) -> WidthMethod:
        """LLM-Pruner, by elements."""
        return LLMPruner()
