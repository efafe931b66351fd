"""The prefill process: runs prompts and ships their pruned KV cache to decode."""

from __future__ import annotations

import socket
import time

import torch

from pdtrim.errors import WireError
from pdtrim.kv.frame import Layout, SentLayer
from pdtrim.kv.policy import HandoverPolicy, select
from pdtrim.kv.wire import read_answer, send_frame
from pdtrim.models.checkpoint import load_stage
from pdtrim.models.model import Model
from pdtrim.plan import PrunePlan
from pdtrim.runtime.control import Control, Handlers, Message
from pdtrim.stage import generate

HANDOVER_TIMEOUT_S = 120.0


class PrefillProcess:
    """Holds the prefill model and, while it lasts, one stream to decode."""

    def __init__(self, control: Control | None, model: Model, plan: PrunePlan) -> None:
        self.control = control
        self.model = model
        self.plan = plan
        self.policy = HandoverPolicy.of(plan)
        self.stream: socket.socket | None = None

    @property
    def handlers(self) -> Handlers:
        """What the session can order."""
        return {"link": self.link, "prefill": self.prefill, "rest": self.rest}

    def attach(self, stream: socket.socket) -> None:
        """Send frames on this stream, and no longer on the one before."""
        self.close()
        stream.settimeout(HANDOVER_TIMEOUT_S)
        self.stream = stream

    def close(self) -> None:
        """End the stream to decode."""
        if self.stream is not None:
            self.stream.close()
            self.stream = None

    def link(self, order: Message) -> None:
        """Take the stream to decode."""
        assert self.control is not None
        self.attach(self.control.take_socket())
        self.control.send("linked")

    def rest(self, order: Message) -> None:
        """Do nothing, as the order before was abandoned."""
        assert self.control is not None
        self.control.send("resting")

    def prefill(self, order: Message) -> None:
        """Run a batch of prompts and hand over each; ``tokens`` leave out the last one."""
        requests: list[Message] = order["requests"]
        started = time.perf_counter()
        with torch.inference_mode():
            caches = self.run([request["tokens"] for request in requests])
        computed = time.perf_counter()
        sent = []
        for request, layers in zip(requests, caches, strict=True):
            layout = Layout.of(self.plan, self.model.dtype, len(request["tokens"]))
            sent.append(self.ship(layout, bytes.fromhex(request["id"]), layers))
        assert self.control is not None
        self.control.send(
            "prefilled",
            bytes=sent,
            prefill_s=computed - started,
            handover_s=time.perf_counter() - computed,
        )

    def run(self, prompts: list[list[int]]) -> list[dict[int, SentLayer]]:
        """Each prompt's kept pairs by layer, after one padded batch."""
        ids_BT = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(tokens, dtype=torch.long) for tokens in prompts], batch_first=True
        ).to(self.model.device)
        caches: list[dict[int, SentLayer]] = [{} for _ in prompts]
        for layer, view in generate.prefill(self.model, ids_BT, self.plan.gates):
            if self.control is not None:
                self.control.check()
            for row, tokens in enumerate(prompts):
                own = view.row(row, len(tokens))
                kept = select(self.policy, layer, own)
                kept.check()
                caches[row][layer] = SentLayer(keep_GN=kept.keep_BGN[0], groups=kept.groups)
        return caches

    def ship(self, layout: Layout, request: bytes, layers: dict[int, SentLayer]) -> int:
        """Send one frame and wait until decode has taken it; returns the bytes sent.

        Raises:
            WireError: decode refused it, or is gone.
        """
        if self.stream is None:
            raise WireError("there is no stream to decode")
        try:
            sent = send_frame(self.stream, layout, request, layers)
            read_answer(self.stream)
        except OSError as error:
            self.close()
            raise WireError(f"the handover to decode broke: {error}") from error
        except BaseException:
            self.close()  # the stream's state is unknown: the session makes a new one
            raise
        return sent


def load(control: Control, folder: str) -> PrefillProcess:
    """Read the checkpoint in ``folder``."""
    return PrefillProcess(control, *load_stage(folder, "prefill"))
