"""pdtrim: prune a language model separately for prefill and for decode.

The usual way through::

    import pdtrim
    from pdtrim.configs import PlanConfig

    model = pdtrim.load_model("smollm2")
    plan = pdtrim.make_plan(model, PlanConfig(prefill_remove=8))
    pdtrim.export_pair(plan, "out/pair", model=model)
    with pdtrim.Session("out/pair") as session:
        print(session.generate(["Hello"])[0].text)

Here is a function for each verb of the command, and what goes in and comes out of them. What each
may be asked stands in ``pdtrim.configs``; methods, calibration text, the simulator and the measures
are below, in modules of their own (``docs/api.md``).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pdtrim.bench.codec import bench_codecs
    from pdtrim.bench.forward import bench_forward
    from pdtrim.bench.removal import bench_stages
    from pdtrim.bench.transfer import bench_transfer
    from pdtrim.bundle import TrimPlan
    from pdtrim.demo import run_demo
    from pdtrim.errors import PdtrimError
    from pdtrim.models.loading import load_model
    from pdtrim.runtime.session import Session
    from pdtrim.verbs.assess import assess
    from pdtrim.verbs.compare import compare_methods
    from pdtrim.verbs.distill import distill_plan
    from pdtrim.verbs.evaluate import evaluate_pair
    from pdtrim.verbs.export import export_pair
    from pdtrim.verbs.measure import measure_sensitivity, run_ablation, sweep_kv
    from pdtrim.verbs.plan import make_plan
    from pdtrim.verbs.report import write_report
    from pdtrim.verbs.roi import estimate_roi
    from pdtrim.verbs.serve import serve_pair
    from pdtrim.verbs.watch import watch_log, watch_requests

__all__ = [
    "PdtrimError",
    "Session",
    "TrimPlan",
    "assess",
    "bench_codecs",
    "bench_forward",
    "bench_stages",
    "bench_transfer",
    "compare_methods",
    "distill_plan",
    "estimate_roi",
    "evaluate_pair",
    "export_pair",
    "load_model",
    "make_plan",
    "measure_sensitivity",
    "run_ablation",
    "run_demo",
    "serve_pair",
    "sweep_kv",
    "watch_log",
    "watch_requests",
    "write_report",
]

_HOMES = {
    "PdtrimError": "pdtrim.errors",
    "Session": "pdtrim.runtime.session",
    "TrimPlan": "pdtrim.bundle",
    "assess": "pdtrim.verbs.assess",
    "bench_codecs": "pdtrim.bench.codec",
    "bench_forward": "pdtrim.bench.forward",
    "bench_stages": "pdtrim.bench.removal",
    "bench_transfer": "pdtrim.bench.transfer",
    "compare_methods": "pdtrim.verbs.compare",
    "distill_plan": "pdtrim.verbs.distill",
    "estimate_roi": "pdtrim.verbs.roi",
    "evaluate_pair": "pdtrim.verbs.evaluate",
    "export_pair": "pdtrim.verbs.export",
    "load_model": "pdtrim.models.loading",
    "make_plan": "pdtrim.verbs.plan",
    "measure_sensitivity": "pdtrim.verbs.measure",
    "run_ablation": "pdtrim.verbs.measure",
    "run_demo": "pdtrim.demo",
    "serve_pair": "pdtrim.verbs.serve",
    "sweep_kv": "pdtrim.verbs.measure",
    "watch_log": "pdtrim.verbs.watch",
    "watch_requests": "pdtrim.verbs.watch",
    "write_report": "pdtrim.verbs.report",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: ``import pdtrim`` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'pdtrim' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
