"""The prefill process: runs prompts and ships their pruned KV cache to decode, layer by layer."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pdtrim.devices import device_of, side_stream
from pdtrim.errors import WireError
from pdtrim.kv.wire import Refused, read_answer
from pdtrim.models.checkpoint import load_stage
from pdtrim.models.model import Model
from pdtrim.plan import PrunePlan
from pdtrim.runtime.config import Way
from pdtrim.runtime.control import Control, Handlers, Message
from pdtrim.runtime.sender import Sender
from pdtrim.runtime.shelf import Shelf
from pdtrim.stage import generate

HANDOVER_TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class HandedOver:
    """A batch that decode has taken.

    Attributes:
        sent: bytes of each request that crossed.
        computed_at: when prefill's last layer was done, by the clock that both stages read.
    """

    sent: list[int]
    computed_at: float


class PrefillProcess:
    """Holds the prefill model and, while it lasts, one stream to decode."""

    def __init__(self, control: Control | None, model: Model, plan: PrunePlan) -> None:
        self.control = control
        self.model = model
        self.plan = plan
        self.stream: socket.socket | None = None
        self.way: Way = "socket"
        self._shelf: Shelf | None = None
        self._side = side_stream(model.device)

    @property
    def handlers(self) -> Handlers:
        """What the session can order."""
        return {"link": self.link, "prefill": self.prefill, "rest": self.rest}

    def attach(self, stream: socket.socket, way: Way = "socket") -> None:
        """Send frames on this stream, and no longer on the one before.

        Raises:
            PdtrimError: NIXL is asked for, and is not installed or does not start.
        """
        self.close()
        if way == "nixl" and self._shelf is None:
            self._shelf = Shelf(self.model.device)
        self.way = way
        stream.settimeout(HANDOVER_TIMEOUT_S)
        self.stream = stream

    def close(self) -> None:
        """End the stream to decode."""
        if self.stream is not None:
            with contextlib.suppress(OSError):  # wakes a thread that writes to it
                self.stream.shutdown(socket.SHUT_RDWR)
            self.stream.close()
            self.stream = None

    def link(self, order: Message) -> None:
        """Take the stream to decode."""
        assert self.control is not None
        self.attach(self.control.take_socket(), order["transport"])
        self.control.send("linked")

    def rest(self, order: Message) -> None:
        """Do nothing, as the order before was abandoned."""
        assert self.control is not None
        self.control.send("resting")

    def prefill(self, order: Message) -> None:
        """Run a batch of prompts and hand over each; ``tokens`` leave out the last one."""
        requests: list[Message] = order["requests"]
        started = time.monotonic()
        done = self.run(
            [bytes.fromhex(request["id"]) for request in requests],
            [request["tokens"] for request in requests],
            overlap=order["overlap"],
        )
        assert self.control is not None
        self.control.send(
            "prefilled",
            bytes=done.sent,
            transport=self.way,
            prefill_s=done.computed_at - started,
            handover_s=time.monotonic() - done.computed_at,
            computed_at=done.computed_at,
        )

    def run(
        self, requests: Sequence[bytes], prompts: Sequence[list[int]], *, overlap: bool = True
    ) -> HandedOver:
        """Run one padded batch, and send what each prompt keeps of each layer.

        Args:
            overlap: send a layer while the next ones are computed; else behind the last one.

        Raises:
            WireError: decode refused the frame, or is gone.
            NotFinite: pairs that a codec cannot hold.
        """
        if self.stream is None:
            raise WireError("there is no stream to decode")
        lengths = [len(tokens) for tokens in prompts]
        shelf = self._shelf if self.way == "nixl" else None
        sender = Sender(
            self.stream, self.model, self.plan, requests, lengths, side=self._side, shelf=shelf
        )
        try:
            with contextlib.nullcontext() if shelf is None else shelf.answering():
                computed_at = self._compute(prompts, sender, overlap=overlap)
                sent = sender.finish()
                read_answer(self.stream)
        except BaseException as error:
            said = self._refusal() if isinstance(error, OSError) else None
            self.close()  # the stream's state is unknown: the session makes a new one
            sender.drop()
            if isinstance(error, OSError):
                raise said or WireError(f"the handover to decode broke: {error}") from error
            raise
        return HandedOver(sent=sent, computed_at=computed_at)

    @torch.inference_mode()
    def _compute(self, prompts: Sequence[list[int]], sender: Sender, *, overlap: bool) -> float:
        """Run the prompts and give the sender each layer; returns when the last one was done."""
        ids_BT = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(tokens, dtype=torch.long) for tokens in prompts], batch_first=True
        ).to(self.model.device)
        held = []
        for layer, view in generate.prefill(self.model, ids_BT, self.plan.gates):
            if self.control is not None:
                self.control.check()
            if overlap:
                sender.put(layer, view)
            else:
                held.append((layer, view))
        if self.model.device.type == "cuda":
            torch.cuda.current_stream(self.model.device).synchronize()
        computed_at = time.monotonic()
        for layer, view in held:
            sender.put(layer, view)
        return computed_at

    def _refusal(self) -> Refused | None:
        """Why decode closed the stream in the middle of a frame, if it said so."""
        assert self.stream is not None
        try:
            self.stream.settimeout(0)
            read_answer(self.stream)
        except Refused as said:
            return said
        except (WireError, OSError):
            pass
        return None


def load(control: Control, folder: str, device: str) -> PrefillProcess:
    """Read the checkpoint in ``folder`` onto a device.

    Raises:
        PdtrimError: there is no such device, or no such checkpoint.
    """
    place = str(device_of(device))
    return PrefillProcess(control, *load_stage(folder, "prefill", device=place))
