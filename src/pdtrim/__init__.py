"""pdtrim: prune a language model separately for prefill and for decode.

The usual way through::

    import pdtrim

    model = pdtrim.load_model("smollm2")
    text = pdtrim.load_calibration(model, pdtrim.CalibrationConfig(source="self"))
    target = pdtrim.Target(prefill_remove=8)
    plan = pdtrim.PDTrim().plan(model, text, target)
    plan.export(model, "out/pair")
    with pdtrim.Session("out/pair") as session:
        print(session.generate(["Hello"])[0].text)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pdtrim.bundle import TrimPlan, export
    from pdtrim.calibration.batches import Calibration, CalibrationConfig, load_calibration
    from pdtrim.errors import PdtrimError
    from pdtrim.evaluate.quality import Quality, measure_quality
    from pdtrim.exported import load_pair
    from pdtrim.methods import Paper, PDTrim, Target
    from pdtrim.models.loading import load_model
    from pdtrim.models.model import Model
    from pdtrim.plan import Gates, LayerKV, PrunePlan
    from pdtrim.runtime.session import Generation, Session
    from pdtrim.stage.forward import Batch, Pair, Trimmed, forward
    from pdtrim.stage.sampling import Sampling

__all__ = [
    "Batch",
    "Calibration",
    "CalibrationConfig",
    "Gates",
    "Generation",
    "LayerKV",
    "Model",
    "PDTrim",
    "Pair",
    "Paper",
    "PdtrimError",
    "PrunePlan",
    "Quality",
    "Sampling",
    "Session",
    "Target",
    "TrimPlan",
    "Trimmed",
    "export",
    "forward",
    "load_calibration",
    "load_model",
    "load_pair",
    "measure_quality",
]

_HOMES = {
    "Batch": "pdtrim.stage.forward",
    "Calibration": "pdtrim.calibration.batches",
    "CalibrationConfig": "pdtrim.calibration.batches",
    "Gates": "pdtrim.plan",
    "Generation": "pdtrim.runtime.session",
    "LayerKV": "pdtrim.plan",
    "Model": "pdtrim.models.model",
    "PDTrim": "pdtrim.methods",
    "Pair": "pdtrim.stage.forward",
    "Paper": "pdtrim.methods",
    "PdtrimError": "pdtrim.errors",
    "PrunePlan": "pdtrim.plan",
    "Quality": "pdtrim.evaluate.quality",
    "Sampling": "pdtrim.stage.sampling",
    "Session": "pdtrim.runtime.session",
    "Target": "pdtrim.methods",
    "TrimPlan": "pdtrim.bundle",
    "Trimmed": "pdtrim.stage.forward",
    "export": "pdtrim.bundle",
    "forward": "pdtrim.stage.forward",
    "load_calibration": "pdtrim.calibration.batches",
    "load_model": "pdtrim.models.loading",
    "load_pair": "pdtrim.exported",
    "measure_quality": "pdtrim.evaluate.quality",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: ``import pdtrim`` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'pdtrim' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
