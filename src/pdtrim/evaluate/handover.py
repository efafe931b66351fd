"""Bytes of a handover, counted where they cross the socket between two real processes."""

from __future__ import annotations

import secrets
import tempfile
from pathlib import Path

from pdtrim.export import export
from pdtrim.kv.frame import Layout
from pdtrim.models.model import Model
from pdtrim.plan import PrunePlan
from pdtrim.runtime.prefill import PrefillProcess
from pdtrim.runtime.receiver import Receiver
from pdtrim.runtime.session import Session
from pdtrim.stage.forward import Batch


def measured_bytes(folder: str | Path, batch: Batch) -> float:
    """Mean bytes a prompt that an exported pair hands over for the batch's prompts."""
    with Session(folder) as session:
        session.generate(batch.prompt_BP.tolist(), max_new_tokens=1)
        return sum(session.kv_bytes) / len(session.kv_bytes)


def loopback_bytes(plan: PrunePlan, model: Model, batch: Batch) -> float:
    """The same within this process: the stages' own sender and receiver over a loopback socket."""
    receiver = Receiver(plan, model.dtype)
    sender = PrefillProcess(None, model, plan)
    sizes = []
    try:
        for prompt in batch.prompt_BP.tolist():
            tokens, request = prompt[:-1], secrets.token_bytes(16)
            receiver.expect(request, len(tokens))
            layout = Layout.of(plan, model.dtype, len(tokens))
            sender.ship(layout, request, sender.run([tokens])[0], receiver.port)
            sizes.append(receiver.take(request).frame_bytes)
    finally:
        sender.close()
        receiver.close()
    return sum(sizes) / len(sizes)


def measured_plan_bytes(plan: PrunePlan, model: Model, batch: Batch) -> float:
    """The same for a plan that has not been exported: a pair is made, run and removed."""
    with tempfile.TemporaryDirectory(prefix="pdtrim-") as folder:
        return measured_bytes(export(plan, model, Path(folder) / "pair"), batch)
