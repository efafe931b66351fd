"""Block removal of the literature, as methods of this library: one file a paper.

All were made for one pruned model; here that is mode ``unified``, their default. All get the same
calibration text as every other method, and pay in the same block-tokens. What differs from a paper
is in its file's docstring; what holds for all of them is in ``base.py``.
"""

from pdtrim.methods.baselines.blockpruner import BlockPruner
from pdtrim.methods.baselines.evopress import EvoPress
from pdtrim.methods.baselines.shortened import ShortenedPPL, ShortenedTaylor
from pdtrim.methods.baselines.shortgpt import ShortGPT
from pdtrim.methods.baselines.sleb import SLEB
from pdtrim.methods.baselines.uidl import UIDL

__all__ = [
    "SLEB",
    "UIDL",
    "BlockPruner",
    "EvoPress",
    "ShortGPT",
    "ShortenedPPL",
    "ShortenedTaylor",
]
