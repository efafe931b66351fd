"""Methods: each makes a plan from a model, calibration text and a target. One file a method."""

from pdtrim.methods.base import Method, Target
from pdtrim.methods.baselines import (
    SLEB,
    UIDL,
    BlockPruner,
    EvoPress,
    ShortenedPPL,
    ShortenedTaylor,
    ShortGPT,
)
from pdtrim.methods.paper import Paper
from pdtrim.methods.pdtrim import PDTrim

METHODS: dict[str, type[Method]] = {
    "pdtrim": PDTrim,
    "paper": Paper,
    "shortgpt": ShortGPT,
    "sleb": SLEB,
    "shortened-ppl": ShortenedPPL,
    "shortened-taylor": ShortenedTaylor,
    "uidl": UIDL,
    "blockpruner": BlockPruner,
    "evopress": EvoPress,
}

__all__ = ["METHODS", "Method", "PDTrim", "Paper", "Target"]
