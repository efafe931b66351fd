"""Bytes of a handover, counted where they cross the socket between two real processes."""

from __future__ import annotations

import tempfile
from pathlib import Path

from pdtrim.export import export
from pdtrim.models.model import Model
from pdtrim.plan import PrunePlan
from pdtrim.runtime.session import Session
from pdtrim.stage.forward import Batch


def measured_bytes(folder: str | Path, batch: Batch) -> float:
    """Mean bytes a prompt that an exported pair hands over for the batch's prompts."""
    with Session(folder) as session:
        session.generate(batch.prompt_BP.tolist(), max_new_tokens=1)
        return sum(session.kv_bytes) / len(session.kv_bytes)


def measured_plan_bytes(plan: PrunePlan, model: Model, batch: Batch) -> float:
    """The same for a plan that has not been exported: a pair is made, run and removed."""
    with tempfile.TemporaryDirectory(prefix="pdtrim-") as folder:
        return measured_bytes(export(plan, model, Path(folder) / "pair"), batch)
