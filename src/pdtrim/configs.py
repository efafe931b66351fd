"""What each verb may be asked: the records of all verbs, to import from one place.

Each is defined beside what it configures. It is frozen and keyword-only, refuses words that it does
not know, and has the command's defaults.
"""

from __future__ import annotations

from pdtrim.bench.configs import CodecsConfig, ForwardConfig, StagesConfig, TransferConfig
from pdtrim.engines.config import ServeConfig
from pdtrim.evaluate.configs import (
    AblationConfig,
    CompareConfig,
    EvalConfig,
    SensitivityConfig,
    SweepConfig,
)
from pdtrim.runtime.config import RuntimeConfig
from pdtrim.stage.sampling import Sampling
from pdtrim.verbs.assess import AssessConfig
from pdtrim.verbs.distill import TrainConfig
from pdtrim.verbs.plan import PlanConfig
from pdtrim.verbs.report import ReportConfig
from pdtrim.verbs.roi import RoiConfig
from pdtrim.verbs.watch import WatchConfig

__all__ = [
    "AblationConfig",
    "AssessConfig",
    "CodecsConfig",
    "CompareConfig",
    "EvalConfig",
    "ForwardConfig",
    "PlanConfig",
    "ReportConfig",
    "RoiConfig",
    "RuntimeConfig",
    "Sampling",
    "SensitivityConfig",
    "ServeConfig",
    "StagesConfig",
    "SweepConfig",
    "TrainConfig",
    "TransferConfig",
    "WatchConfig",
]
