"""The prefill process: runs prompts and ships their pruned KV cache to decode.

Run by the session as ``python -m pdtrim.runtime.prefill DIR/prefill``.
"""

from __future__ import annotations

import socket
import sys
import time

import torch

from pdtrim.kv.frame import Layout, SentLayer
from pdtrim.kv.policy import HandoverPolicy, to_code
from pdtrim.kv.wire import read_answer, send_frame
from pdtrim.models.checkpoint import load_stage
from pdtrim.models.model import Model
from pdtrim.plan import PrunePlan
from pdtrim.runtime.control import Control, Message
from pdtrim.stage import generate

CONNECT_TIMEOUT_S = 10.0
HANDOVER_TIMEOUT_S = 120.0


class PrefillProcess:
    """Holds the prefill model and, while it lasts, one connection to decode."""

    def __init__(self, control: Control | None, model: Model, plan: PrunePlan) -> None:
        self.control = control
        self.model = model
        self.plan = plan
        self.policy = HandoverPolicy.of(plan)
        self.link: socket.socket | None = None

    def close(self) -> None:
        """End the connection to decode."""
        if self.link is not None:
            self.link.close()
            self.link = None

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
            sent.append(self.ship(layout, bytes.fromhex(request["id"]), layers, order["port"]))
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
            for row, tokens in enumerate(prompts):
                own = view.row(row, len(tokens))
                keep_BGN, groups = to_code(self.policy, layer, own)
                caches[row][layer] = SentLayer(keep_GN=keep_BGN[0], groups=groups)
        return caches

    def ship(self, layout: Layout, request: bytes, layers: dict[int, SentLayer], port: int) -> int:
        """Send one frame and wait until decode has taken it; returns the bytes sent."""
        if self.link is None:
            self.link = socket.create_connection(("127.0.0.1", port), timeout=CONNECT_TIMEOUT_S)
            self.link.settimeout(HANDOVER_TIMEOUT_S)
            self.link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            sent = send_frame(self.link, layout, request, layers)
            read_answer(self.link)
        except Exception:
            self.close()  # the stream's state is unknown: start a new one next time
            raise
        return sent


def main() -> None:
    """Load the checkpoint, say so, and serve."""
    control = Control()
    try:
        model, plan = load_stage(sys.argv[1], "prefill")
    except ValueError as error:
        control.send("error", message=str(error))
        return
    process = PrefillProcess(control, model, plan)
    control.send("ready", digest=plan.digest)
    control.serve({"prefill": process.prefill})


if __name__ == "__main__":
    main()
