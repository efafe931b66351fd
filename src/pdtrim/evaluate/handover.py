"""Real pairs at work: bytes counted where they cross the socket, and what two processes answer."""

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

ANSWER_TOKENS = 80


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What two processes did.

    Attributes:
        kv_bytes: that crossed the socket, mean over the prompts.
        answer: to what was asked; None if nothing was.
    """

    kv_bytes: float
    answer: str | None


def run_pair(folder: str | Path, batch: Batch, ask: str | None = None) -> Ran:
    """Start an exported pair, hand the batch's prompts over, and ask it for some greedy text.

    Raises:
        PdtrimError: something is asked of a pair without a tokenizer, or a process failed.
    """
    answer = None
    with Session(folder) as session:
        if ask is not None:
            answer = session.generate([ask], max_new_tokens=ANSWER_TOKENS)[0].text
        session.generate(batch.prompt_BP.tolist(), max_new_tokens=1)
        return Ran(kv_bytes=sum(session.kv_bytes) / len(session.kv_bytes), answer=answer)


def run_plan(trim: TrimPlan, model: Model, batch: Batch, ask: str | None = None) -> Ran:
    """The same of a plan; one that has not been exported is, for as long as it runs."""
    if trim.exported is not None:
        return run_pair(trim.exported, batch, ask)
    with tempfile.TemporaryDirectory(prefix="pdtrim-") as folder:
        return run_pair(trim.export(model, Path(folder) / "pair"), batch, ask)


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
