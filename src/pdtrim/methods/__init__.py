"""Methods: each makes a plan from a model, calibration text and a target. One file a method."""

from pdtrim.methods.base import Method, Target
from pdtrim.methods.baselines import BASELINES
from pdtrim.methods.flap_pdtrim import FLAPPDTrim
from pdtrim.methods.llm_pruner_pdtrim import LLMPrunerPDTrim
from pdtrim.methods.paper import Paper
from pdtrim.methods.pdtrim import PDTrim
from pdtrim.methods.shortgpt_pdtrim import ShortGPTPDTrim
from pdtrim.methods.wanda_sp_pdtrim import WandaSPPDTrim

HYBRIDS: tuple[type[Method], ...] = (
    ShortGPTPDTrim,
    LLMPrunerPDTrim,
    FLAPPDTrim,
    WandaSPPDTrim,
)
_ALL: tuple[type[Method], ...] = (PDTrim, Paper, *BASELINES, *HYBRIDS)
METHODS: dict[str, type[Method]] = {kind.name: kind for kind in _ALL}
"""By name, in the order in which they are listed everywhere."""

__all__ = ["METHODS", "Method", "PDTrim", "Paper", "Target"]
