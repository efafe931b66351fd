"""Pruning of the literature, as methods of this library: one file a paper.

Some remove blocks (``base.py``), some make them narrower (``width.py``).

All were made for one pruned model; here that is mode ``unified``, their default. All get the same
calibration text as every other method, and pay in the same block-tokens. What differs from a paper
is in its file's docstring; what holds for all of a kind is in the file named above.
"""

from pdtrim.methods.base import Method
from pdtrim.methods.baselines.blockpruner import BlockPruner
from pdtrim.methods.baselines.evopress import EvoPress
from pdtrim.methods.baselines.flap import FLAP
from pdtrim.methods.baselines.llm_pruner import LLMPruner, LLMPrunerVector
from pdtrim.methods.baselines.shortened import ShortenedPPL, ShortenedTaylor
from pdtrim.methods.baselines.shortgpt import ShortGPT
from pdtrim.methods.baselines.sleb import SLEB
from pdtrim.methods.baselines.uidl import UIDL
from pdtrim.methods.baselines.wanda_sp import WandaSP

BASELINES: tuple[type[Method], ...] = (
    *(ShortGPT, SLEB, ShortenedPPL, ShortenedTaylor, UIDL, BlockPruner, EvoPress),
    *(LLMPruner, LLMPrunerVector, FLAP, WandaSP),
)
