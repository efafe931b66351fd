"""Bytes of a handover, counted where they cross the socket between two real processes."""

from __future__ import annotations

import secrets
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pdtrim.bundle import TrimPlan
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


@dataclass(frozen=True, kw_only=True)
class Loopback:
    """Mean bytes a prompt: of the frame, and of the pairs that decode then holds."""

    frame: float
    cache: float


def loopback_bytes(plan: PrunePlan, prefill: Model, batch: Batch) -> Loopback:
    """Counted within this process: the stages' own sender and receiver over a socket pair.

    Args:
        prefill: what prefill runs, as in ``TrimPlan.pair``; that is the dense model for a plan
            without replaced or narrower blocks.
    """
    receiver = Receiver(plan, prefill.dtype)
    sender = PrefillProcess(None, prefill, plan)
    frames = caches = 0
    ours, theirs = socket.socketpair()
    sender.attach(ours)
    receiver.attach(theirs)
    try:
        for prompt in batch.prompt_BP.tolist():
            tokens, request = prompt[:-1], secrets.token_bytes(16)
            receiver.expect(request, len(tokens))
            sender.run([request], [tokens])
            arrived = receiver.take(request)
            frames += arrived.frame_bytes
            groups = [group for layer in arrived.layers.values() for group in layer.groups]
            caches += sum(g.k_BgMD.nbytes + g.v_BgMD.nbytes for g in groups)
    finally:
        sender.close()
        receiver.close()
    return Loopback(frame=frames / len(batch), cache=caches / len(batch))


def measured_plan_bytes(trim: TrimPlan, model: Model, batch: Batch) -> float:
    """The same for a plan; one that has not been exported is, for as long as it is measured."""
    if trim.exported is not None:
        return measured_bytes(trim.exported, batch)
    with tempfile.TemporaryDirectory(prefix="pdtrim-") as folder:
        return measured_bytes(trim.export(model, Path(folder) / "pair"), batch)
