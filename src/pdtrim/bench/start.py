"""What handing over a prompt takes on the machine that is about to serve a pair.

``pdtrim serve`` runs this as a process of its own, ``python -m pdtrim.bench.start``, before it
starts any server: what the measurement holds of a GPU's memory is free again when it ends.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from pdtrim.bench.lanes import facts_of
from pdtrim.bench.nixl_link import NixlLink
from pdtrim.bench.traffic import Sizes, random_cache
from pdtrim.clock import timed
from pdtrim.devices import device_of
from pdtrim.engines.pages import bytes_sent, is_coded, pages_of, pages_sent
from pdtrim.engines.ranges import NONCE_BYTES, Batch, Form, Part
from pdtrim.exported import read_pair
from pdtrim.kv.kernels import kernels_of, together
from pdtrim.models.loading import dtype_named
from pdtrim.plan import PrunePlan

SAYS = "pdtrim-start "
"""What the line begins with that holds the result."""
REPEATS = 7
LONGEST = 8192
MOST_BYTES = 2**28
"""Of the dense model's cache of the prompt, in a buffer of each process."""


@dataclass(frozen=True, kw_only=True)
class Read:
    """One READ by NIXL from another process: bytes, descriptors, median seconds."""

    nbytes: int
    pieces: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Coded:
    """A prompt under the plan's codecs.

    Attributes:
        raw_bytes: of the tokens that are coded, before.
        unaided: codecs that no kernel codes on this GPU.
    """

    read: Read
    encode_s: float
    decode_s: float
    raw_bytes: int
    unaided: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A prompt's handover, on empty machines, one step after the other.

    Attributes:
        ranks: that share the KV heads; bytes and seconds are of one, the others work beside it.
        dense: the pages that vLLM's own connector reads of the dense model.
        pages: the plan's, before any codec.
        copy_gb_s: of a plain copy of as many bytes as ``dense`` on the device that reads.
    """

    tokens: int
    block_size: int
    dtype: str
    devices: tuple[str, str]
    hardware: str | None
    dense: Read
    pages: Read
    coded: Coded | None
    copy_gb_s: float
    ranks: int = 1

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Measured:
        """Of :func:`dataclasses.asdict`, from the process that measured."""
        return TypeAdapter(cls).validate_python(data)

    @property
    def read(self) -> Read:
        """What decode reads of this plan."""
        return self.coded.read if self.coded else self.pages

    @property
    def seconds(self) -> float:
        """Of the plan's handover."""
        if self.coded is None:
            return self.pages.seconds
        return self.coded.encode_s + self.coded.read.seconds + self.coded.decode_s


def dense_sizes(plan: PrunePlan, tokens: int, ranks: int = 1) -> Sizes:
    """Of the dense model's cache, on one of so many ranks."""
    model = plan.model
    heads = max(1, model.num_kv_heads // ranks)
    return Sizes(layers=model.num_layers, heads=heads, tokens=tokens, width=model.head_dim)


@torch.inference_mode()
def measure(
    plan: PrunePlan,
    *,
    dtype: str,
    block_size: int,
    longest: int,
    devices: tuple[str, str],
    ranks: int = 1,
) -> Measured:
    """Measure a pair's handover, of the longest prompt that two buffers of 256 MiB hold.

    Args:
        block_size: tokens of an engine's page.
        longest: tokens of the longest prompt.
        devices: prefill's and decode's.
        ranks: of each server in tensor parallel; one's share is measured.

    Raises:
        PdtrimError: NIXL is not there or fails, or a device is not there.
    """
    kind, (source, target) = dtype_named(dtype), (device_of(name) for name in devices)
    layers = plan.model.num_layers
    page = dense_sizes(plan, block_size, ranks).raw_bytes(kind) // layers
    most = MOST_BYTES // (page * layers) * block_size
    tokens = max(1, min(longest, LONGEST, most))
    whole = layers * pages_of(tokens, block_size)
    sent = sum(pages_sent(plan, layer, tokens, block_size) for layer in plan.sent_layers)
    nbytes = bytes_sent(plan, tokens, block_size, kind.itemsize, ranks)
    wanted = [(page * whole, whole), (nbytes, sent)]
    coded = None
    if is_coded(plan):
        form = Form.of(plan, kind, tokens, block_size, ranks)
        nbytes, encode_s, decode_s = _code(form, source, target)
        wanted.append((nbytes, 1))
    dense, pages, *more = _reads(wanted, source, target)
    if more:
        coded = Coded(
            read=more[0],
            encode_s=encode_s,
            decode_s=decode_s,
            raw_bytes=2
            * kind.itemsize
            * sum(part.heads * part.tokens * part.width for part in form.parts),
            unaided=_unaided(form, source),
        )
    cache = torch.zeros(page * whole, dtype=torch.uint8, device=target)
    copy_s = _median(lambda: timed(cache.clone, target))
    return Measured(
        tokens=tokens,
        block_size=block_size,
        dtype=dtype,
        devices=(str(source), str(target)),
        hardware=facts_of(target)["hardware"],
        dense=dense,
        pages=pages,
        coded=coded,
        copy_gb_s=page * whole / copy_s / 1e9,
        ranks=ranks,
    )


def _reads(
    wanted: Sequence[tuple[int, int]], source: torch.device, target: torch.device
) -> list[Read]:
    """Reads of so many bytes in so many descriptors, in turn, so that all meet the same noise."""
    room = max(nbytes for nbytes, _ in wanted)
    with closing(NixlLink(target, source, room)) as link:
        rounds = [
            [link.read(nbytes - nbytes % pieces, pieces) for nbytes, pieces in wanted]
            for _ in range(REPEATS + 1)
        ][1:]
    return [
        Read(nbytes=nbytes, pieces=pieces, seconds=statistics.median(taken))
        for (nbytes, pieces), taken in zip(wanted, zip(*rounds, strict=True), strict=True)
    ]


def _code(form: Form, source: torch.device, target: torch.device) -> tuple[int, float, float]:
    """Bytes of the plan's range, and median seconds to write it on one device and read on another.

    Keys and values are random, with a few loud channels.
    """
    nonce = bytes(NONCE_BYTES)
    heads, tokens, width = (
        max(getattr(p, size) for p in form.parts) for size in ("heads", "tokens", "width")
    )
    sizes = Sizes(layers=1, heads=heads, tokens=tokens, width=width)
    dtype = form.parts[0].dtype
    cache = {place: random_cache(sizes, dtype, place)[:, 0] for place in {source, target}}
    room = torch.zeros(form.most, dtype=torch.uint8, device=source)

    def rows(parts: Sequence[Part], device: torch.device) -> Batch:
        """What stands for caches of these layers: one for all."""
        k_GND, v_GND = (x[: parts[0].heads] for x in cache[device])
        at_M = torch.arange(parts[0].tokens, device=device)
        return [(k_GND, v_GND)] * len(parts), at_M.expand(len(parts), parts[0].heads, -1)

    def write() -> int:
        return form.write(room, nonce, (rows(run, source) for run in form.runs))

    def read() -> None:
        with together():
            for parts, data_YS in form.read(staged, nonce):
                kv, kept_YGM = rows(parts, target)
                assert kept_YGM is not None
                parts[0].codec.decode_layers(data_YS, kv, kept_YGM)

    encode_s = _median(lambda: timed(write, source))
    nbytes = write()
    staged = room[:nbytes].to(target)
    return nbytes, encode_s, _median(lambda: timed(read, target))


def _unaided(form: Form, device: torch.device) -> tuple[str, ...]:
    if device.type != "cuda":
        return ()
    parts = (part for part in form.parts if part.codec.kernels is not None)
    names = {
        part.codec.name: None
        for part in parts
        if kernels_of(part.codec, device, part.tokens, part.width) is None
    }
    return tuple(names)


def _median(run: Callable[[], float]) -> float:
    """Behind a run that warms up."""
    run()
    return statistics.median(run() for _ in range(REPEATS))


def _main(pair: str, settings: dict[str, Any]) -> None:
    _, plan = read_pair(Path(pair))
    made = measure(plan, **{**settings, "devices": tuple(settings["devices"])})
    print(SAYS + json.dumps(asdict(made)), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1], json.loads(sys.argv[2]))
