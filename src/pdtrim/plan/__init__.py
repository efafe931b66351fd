"""The plan: gates, widths and KV rules of both stages, as one file of data."""

from pdtrim.plan.gates import AttentionGate, Gates
from pdtrim.plan.plan import (
    MAX_PLAN_BYTES,
    BaseModelRef,
    HeldOutScore,
    LayerKV,
    Provenance,
    PrunePlan,
    Replacement,
    Sha256,
)
from pdtrim.plan.width import Width, Widths
from pdtrim.words import STAGES, Mode, Stage

__all__ = [
    "MAX_PLAN_BYTES",
    "STAGES",
    "AttentionGate",
    "BaseModelRef",
    "Gates",
    "HeldOutScore",
    "LayerKV",
    "Mode",
    "Provenance",
    "PrunePlan",
    "Replacement",
    "Sha256",
    "Stage",
    "Width",
    "Widths",
]
