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
    from pdtrim.bench.codec import bench_codecs
    from pdtrim.bench.forward import bench_forward
    from pdtrim.bench.removal import bench_stages
    from pdtrim.bench.transfer import bench_transfer
    from pdtrim.bundle import TrimPlan, export
    from pdtrim.calibration.batches import Calibration, CalibrationConfig, load_calibration
    from pdtrim.demo import run_demo
    from pdtrim.engines.vllm.launch import ServeConfig
    from pdtrim.errors import PdtrimError
    from pdtrim.evaluate.ablation import AblationConfig
    from pdtrim.evaluate.compare.measure import CompareConfig
    from pdtrim.evaluate.kv_sweep import SweepConfig
    from pdtrim.evaluate.quality import Quality, measure_quality
    from pdtrim.evaluate.run import EvalConfig, evaluate_text
    from pdtrim.evaluate.tasks.result import evaluate_tasks
    from pdtrim.evaluate.tasks.run import TasksConfig
    from pdtrim.exported import load_pair
    from pdtrim.methods import Paper, PDTrim, Target
    from pdtrim.models.loading import load_model
    from pdtrim.models.model import Model
    from pdtrim.plan import Gates, LayerKV, PrunePlan
    from pdtrim.runtime.session import Generation, Session
    from pdtrim.stage.forward import Batch, Pair, Trimmed, forward
    from pdtrim.stage.sampling import Sampling
    from pdtrim.verbs.assess import AssessConfig, assess
    from pdtrim.verbs.compare import compare_methods
    from pdtrim.verbs.distill import TrainConfig, train
    from pdtrim.verbs.export import export_pair
    from pdtrim.verbs.measure import measure_sensitivity, run_ablation, sweep_kv
    from pdtrim.verbs.plan import PlanConfig, make_plan
    from pdtrim.verbs.report import ReportConfig, write_report
    from pdtrim.verbs.roi import RoiConfig, estimate_roi
    from pdtrim.verbs.serve import serve_pair

__all__ = [
    "AblationConfig",
    "AssessConfig",
    "Batch",
    "Calibration",
    "CalibrationConfig",
    "CompareConfig",
    "EvalConfig",
    "Gates",
    "Generation",
    "LayerKV",
    "Model",
    "PDTrim",
    "Pair",
    "Paper",
    "PdtrimError",
    "PlanConfig",
    "PrunePlan",
    "Quality",
    "ReportConfig",
    "RoiConfig",
    "Sampling",
    "ServeConfig",
    "Session",
    "SweepConfig",
    "Target",
    "TasksConfig",
    "TrainConfig",
    "TrimPlan",
    "Trimmed",
    "assess",
    "bench_codecs",
    "bench_forward",
    "bench_stages",
    "bench_transfer",
    "compare_methods",
    "estimate_roi",
    "evaluate_tasks",
    "evaluate_text",
    "export",
    "export_pair",
    "forward",
    "load_calibration",
    "load_model",
    "load_pair",
    "make_plan",
    "measure_quality",
    "measure_sensitivity",
    "run_ablation",
    "run_demo",
    "serve_pair",
    "sweep_kv",
    "train",
    "write_report",
]

_HOMES = {
    "TrainConfig": "pdtrim.verbs.distill",
    "train": "pdtrim.verbs.distill",
    "bench_forward": "pdtrim.bench.forward",
    "evaluate_text": "pdtrim.evaluate.run",
    "AssessConfig": "pdtrim.verbs.assess",
    "ReportConfig": "pdtrim.verbs.report",
    "write_report": "pdtrim.verbs.report",
    "RoiConfig": "pdtrim.verbs.roi",
    "assess": "pdtrim.verbs.assess",
    "estimate_roi": "pdtrim.verbs.roi",
    "AblationConfig": "pdtrim.evaluate.ablation",
    "Batch": "pdtrim.stage.forward",
    "Calibration": "pdtrim.calibration.batches",
    "CalibrationConfig": "pdtrim.calibration.batches",
    "CompareConfig": "pdtrim.evaluate.compare.measure",
    "EvalConfig": "pdtrim.evaluate.run",
    "Gates": "pdtrim.plan",
    "Generation": "pdtrim.runtime.session",
    "LayerKV": "pdtrim.plan",
    "Model": "pdtrim.models.model",
    "PDTrim": "pdtrim.methods",
    "Pair": "pdtrim.stage.forward",
    "Paper": "pdtrim.methods",
    "PdtrimError": "pdtrim.errors",
    "PlanConfig": "pdtrim.verbs.plan",
    "PrunePlan": "pdtrim.plan",
    "Quality": "pdtrim.evaluate.quality",
    "Sampling": "pdtrim.stage.sampling",
    "ServeConfig": "pdtrim.engines.vllm.launch",
    "Session": "pdtrim.runtime.session",
    "SweepConfig": "pdtrim.evaluate.kv_sweep",
    "Target": "pdtrim.methods",
    "TasksConfig": "pdtrim.evaluate.tasks.run",
    "TrimPlan": "pdtrim.bundle",
    "Trimmed": "pdtrim.stage.forward",
    "bench_codecs": "pdtrim.bench.codec",
    "bench_stages": "pdtrim.bench.removal",
    "bench_transfer": "pdtrim.bench.transfer",
    "compare_methods": "pdtrim.verbs.compare",
    "evaluate_tasks": "pdtrim.evaluate.tasks.result",
    "export": "pdtrim.bundle",
    "export_pair": "pdtrim.verbs.export",
    "forward": "pdtrim.stage.forward",
    "load_calibration": "pdtrim.calibration.batches",
    "load_model": "pdtrim.models.loading",
    "load_pair": "pdtrim.exported",
    "make_plan": "pdtrim.verbs.plan",
    "measure_quality": "pdtrim.evaluate.quality",
    "measure_sensitivity": "pdtrim.verbs.measure",
    "run_ablation": "pdtrim.verbs.measure",
    "run_demo": "pdtrim.demo",
    "serve_pair": "pdtrim.verbs.serve",
    "sweep_kv": "pdtrim.verbs.measure",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: ``import pdtrim`` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'pdtrim' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
