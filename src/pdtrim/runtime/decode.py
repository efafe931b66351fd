"""The decode process: takes handed-over KV caches and generates from them, or scores given text.

Shapes: B requests of a batch, C continuation tokens, V vocabulary.
"""

from __future__ import annotations

import time

import torch
from safetensors.torch import save_file
from torch import Tensor

from pdtrim.clock import finish
from pdtrim.devices import device_of
from pdtrim.kv.frame import SentLayer
from pdtrim.kv.join import join
from pdtrim.models.checkpoint import load_stage
from pdtrim.models.model import Model
from pdtrim.plan import PrunePlan
from pdtrim.runtime.control import Control, Handlers, Message
from pdtrim.runtime.receiver import Receiver
from pdtrim.stage import generate
from pdtrim.stage.cache import LayerCache
from pdtrim.stage.sampler import Sampler
from pdtrim.stage.sampling import Sampling


class DecodeProcess:
    """Holds the decode model and the receiver of caches."""

    def __init__(self, control: Control, model: Model, plan: PrunePlan) -> None:
        self.control = control
        self.model = model
        self.plan = plan
        self.receiver = Receiver(plan, model.dtype, model.device)

    @property
    def handlers(self) -> Handlers:
        """What the session can order."""
        return {
            "link": self.link,
            "expect": self.expect,
            "rest": self.rest,
            "generate": self.generate,
            "score": self.score,
        }

    def link(self, order: Message) -> None:
        """Take the stream on which frames will come."""
        self.receiver.attach(self.control.take_socket(), order["transport"])
        self.control.send("linked")

    def expect(self, order: Message) -> None:
        """Announce the requests of a batch, whose frames may come; earlier ones are forgotten."""
        self.receiver.clear()
        for request in order["requests"]:
            self.receiver.expect(bytes.fromhex(request["id"]), request["tokens"])
        self.control.send("expecting")

    def rest(self, order: Message) -> None:
        """Drop what has come or may come of a batch that was abandoned."""
        self.receiver.clear()
        self.control.send("resting")

    def generate(self, order: Message) -> None:
        """Sample up to ``max_new_tokens`` a request; each step is one event."""
        requests: list[Message] = order["requests"]
        started = time.perf_counter()
        caches, received = self.caches(requests, order["max_new_tokens"])
        ready_at = time.monotonic()
        sampler = Sampler(Sampling(**order["sampling"]), len(requests))
        stop = set(order["stop"])
        running = set(range(len(requests)))
        last_B, positions_B = self.starts(requests)
        cache_bytes = sum(cache.nbytes for cache in caches.values())
        for ids_B in generate.generate(
            self.model,
            self.plan.gates,
            caches,
            last_B,
            positions_B,
            sampler,
            max_new_tokens=order["max_new_tokens"],
        ):
            self.control.check()
            ids = ids_B.tolist()
            self.control.send("tokens", rows=sorted(running), ids=[ids[r] for r in sorted(running)])
            running = {row for row in running if ids[row] not in stop}
            if not running:
                break
        self.control.send(
            "done",
            bytes=received,
            cache_bytes=cache_bytes,
            ready_at=ready_at,
            decode_s=time.perf_counter() - started,
        )

    @torch.inference_mode()
    def score(self, order: Message) -> None:
        """Write the logits ``[B, C, V]`` of given continuations of one length to a file."""
        requests: list[Message] = order["requests"]
        continuation_BC = torch.tensor(order["continuation"], device=self.model.device)
        C = continuation_BC.shape[1]
        caches, received = self.caches(requests, C)
        last_B, positions_B = self.starts(requests)
        ids_BC = torch.cat((last_B[:, None], continuation_BC[:, :-1]), dim=1)
        positions_BC = positions_B[:, None] + torch.arange(C, device=self.model.device)
        y = generate.decode_tokens(self.model, self.plan.gates, caches, ids_BC, positions_BC)
        save_file({"logits": self.model.head(y).float().cpu().contiguous()}, order["file"])
        self.control.send("scored", bytes=received)

    def starts(self, requests: list[Message]) -> tuple[Tensor, Tensor]:
        """Each prompt's last token and its position, ``[B]`` each."""
        last_B = torch.tensor([r["last"] for r in requests], device=self.model.device)
        positions_B = torch.tensor([r["tokens"] for r in requests], device=self.model.device)
        return last_B, positions_B

    def caches(
        self, requests: list[Message], capacity: int
    ) -> tuple[dict[int, LayerCache], list[int]]:
        """One cache a layer for the whole batch, and each request's bytes that crossed."""
        arrived = [self.receiver.take(bytes.fromhex(r["id"])) for r in requests]
        caches = {
            layer: self._layer_cache(layer, [a.layers.pop(layer) for a in arrived], capacity)
            for layer in self.plan.sent_layers
        }
        finish(self.model.device)  # what came is copied, and its memory free
        return caches, [a.frame_bytes for a in arrived]

    def _layer_cache(self, layer: int, sent: list[SentLayer], capacity: int) -> LayerCache:
        groups = join([self._with_bias(layer, one) for one in sent])
        return LayerCache(groups, capacity=capacity, window=self.model.block(layer).window)

    def _with_bias(self, layer: int, sent: SentLayer) -> SentLayer:
        """What prefill took from the pairs before they were coded is added again."""
        exact = self.plan.kv[layer].codec.exact
        bias = None if exact else self.model.block(layer).kv_bias()
        if bias is None:
            return sent
        at_T = torch.arange(sent.keep_GN.shape[1], device=self.model.device)
        cos, sin = self.model.rope(at_T[None])
        groups = [bias.added_to(group, (cos[0], sin[0])) for group in sent.groups]
        return SentLayer(keep_GN=sent.keep_GN, groups=groups)


def load(control: Control, folder: str, device: str) -> DecodeProcess:
    """Read the checkpoint in ``folder`` onto a device.

    Raises:
        PdtrimError: there is no such device, or no such checkpoint.
    """
    place = str(device_of(device))
    return DecodeProcess(control, *load_stage(folder, "decode", device=place))
