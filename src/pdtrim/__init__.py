"""pdtrim: prune a language model separately for prefill and for decode.

The usual way through::

    import pdtrim

    model = pdtrim.load_model("smollm2")
    text = pdtrim.load_calibration(model, pdtrim.CalibrationConfig(source="self"))
    target = pdtrim.Target(prefill_remove=8, decode_remove=0, kv="full")
    plan = pdtrim.PDTrim().plan(model, text, target)
    pdtrim.export(plan, model, "out/pair")
    with pdtrim.Session("out/pair") as session:
        print(session.generate(["Hello"])[0].text)
"""

from pdtrim.calibration.batches import Calibration, CalibrationConfig, load_calibration
from pdtrim.errors import PdtrimError
from pdtrim.evaluate.quality import Quality, Variant, measure_quality
from pdtrim.export import export, load_pair
from pdtrim.methods import Paper, PDTrim, Target
from pdtrim.models.loading import load_model
from pdtrim.models.model import Model
from pdtrim.plan import Gates, LayerKV, PrunePlan
from pdtrim.runtime.session import Generation, Session
from pdtrim.stage.forward import Batch, Pair, forward
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
    "Variant",
    "export",
    "forward",
    "load_calibration",
    "load_model",
    "load_pair",
    "measure_quality",
]
