"""The plan that prunes nothing: the reference whose handover others are compared with."""

from __future__ import annotations

from pdtrim.models.model import Model
from pdtrim.plan import Gates, LayerKV, Provenance, PrunePlan
from pdtrim.versions import versions


def dense_plan(model: Model) -> PrunePlan:
    """Both stages whole, all KV sent."""
    return PrunePlan(
        model=model.ref,
        gates=Gates.dense(model.num_layers),
        kv=(LayerKV(),) * model.num_layers,
        provenance=Provenance(
            method="dense",
            mode="projected",
            seed=0,
            calibration="none",
            calibration_hash="",
            search_block_tokens=0,
            versions=versions(),
        ),
    )
