"""Methods: each makes a plan from a model, calibration text and a target. One file a method."""

from pdtrim.methods.base import Method, Target
from pdtrim.methods.baselines import (
    FLAP,
    SLEB,
    UIDL,
    BlockPruner,
    EvoPress,
    LLMPruner,
    LLMPrunerVector,
    ShortenedPPL,
    ShortenedTaylor,
    ShortGPT,
    WandaSP,
)
from pdtrim.methods.flap_pdtrim import FLAPPDTrim
from pdtrim.methods.llm_pruner_pdtrim import LLMPrunerPDTrim
from pdtrim.methods.paper import Paper
from pdtrim.methods.pdtrim import PDTrim
from pdtrim.methods.shortgpt_pdtrim import ShortGPTPDTrim

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
    "llm-pruner": LLMPruner,
    "llm-pruner-vector": LLMPrunerVector,
    "flap": FLAP,
    "wanda-sp": WandaSP,
    "shortgpt+pdtrim": ShortGPTPDTrim,
    "llm-pruner+pdtrim": LLMPrunerPDTrim,
    "flap+pdtrim": FLAPPDTrim,
}

__all__ = ["METHODS", "Method", "PDTrim", "Paper", "Target"]
