"""Where a request's time goes, what pruning or a codec could save of it, and what to do.

Bounds, not promises: blocks that prefill loses save at most their share of its time, and a codec
saves the bytes on the link less the time to encode and decode. A lever counts if it saves a given
share of a request's time, of the GPU time where that is known, or of the time to the first token
where that misses its target.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pdtrim.cost.handover import CodecFile, coding


@dataclass(frozen=True, kw_only=True)
class Request:
    """Mean seconds of one request.

    Attributes:
        queue_s: None where nothing says it.
        gpu_prefill_s, gpu_decode_s: GPU time, shared with the batch; None where it is not known.
        raw_bytes: that a handover sends now.
        layers: that they are of; 1, as if coded at once, where nothing says it.
        link_gbit_s: of the link, or what the handovers reached.
    """

    queue_s: float | None
    prefill_s: float
    handover_s: float
    decode_s: float
    raw_bytes: float | None
    layers: int = 1
    link_gbit_s: float | None
    gpu_prefill_s: float | None = None
    gpu_decode_s: float | None = None
    sources: dict[str, str]

    @property
    def first_s(self) -> float:
        """To the first token."""
        return (self.queue_s or 0.0) + self.prefill_s + self.handover_s

    @property
    def total_s(self) -> float:
        """To the last."""
        return self.first_s + self.decode_s

    def parts(self) -> list[dict[str, Any]]:
        """Each part with its share and source."""
        named = (
            ("queue", self.queue_s),
            ("prefill", self.prefill_s),
            ("handover", self.handover_s),
            ("decode", self.decode_s),
        )
        return [
            {
                "part": name,
                "seconds": seconds,
                "share": None if seconds is None else seconds / self.total_s,
                "source": self.sources[name],
            }
            for name, seconds in named
        ]


@dataclass(frozen=True, kw_only=True)
class Lever:
    """What one change could save of a request at most."""

    name: str
    saves_s: float
    share_of_request: float
    share_of_gpu: float | None
    share_of_first: float
    counts: bool
    source: str
    compression: float | None = None


def levers(
    request: Request,
    *,
    remove: float,
    worth: float,
    ttft: float | None,
    codecs: Sequence[CodecFile],
) -> list[Lever]:
    """Blocks out of prefill, then the codecs that save anything, the best first."""

    def made(name: str, saves: float, gpu: float | None, source: str, x: float | None) -> Lever:
        gpu_total = (request.gpu_prefill_s or 0.0) + (request.gpu_decode_s or 0.0)
        of_gpu = None if gpu is None or gpu_total == 0 else gpu / gpu_total
        of_request, of_first = saves / request.total_s, saves / request.first_s
        late = ttft is not None and request.first_s > ttft
        return Lever(
            name=name,
            saves_s=saves,
            share_of_request=of_request,
            share_of_gpu=of_gpu,
            share_of_first=of_first,
            counts=max(of_request, of_gpu or 0.0, of_first if late else 0.0) >= worth,
            source=source,
            compression=x,
        )

    gpu = request.gpu_prefill_s
    found = [
        made(
            f"prefill without {remove:.0%} of its blocks",
            remove * request.prefill_s,
            None if gpu is None else remove * gpu,
            f"formula: {remove:.0%} of prefill's time, at most",
            None,
        )
    ]
    coded = []
    for name, (saves, x, source) in _codec_savings(request, codecs).items():
        if saves > 0:
            coded.append(made(f"codec {name}", saves, None, source, x))
    return found + sorted(coded, key=lambda lever: -lever.saves_s)


def _codec_savings(
    request: Request, codecs: Sequence[CodecFile]
) -> dict[str, tuple[float, float, str]]:
    """Seconds saved, compression and source by codec."""
    size, link = request.raw_bytes, request.link_gbit_s
    if size is None or link is None:
        return {}
    found: dict[str, tuple[float, float, str]] = {}
    for name in sorted({name for file in codecs for name in file.speeds}):
        made = coding(name, size, request.layers, codecs)
        wire = size * (1 - 1 / made.compression) * 8 / (link * 1e9)
        found[name] = wire - made.encode_s - made.decode_s, made.compression, made.source
    return found


def advice(found: Sequence[Lever], *, model: str, remove: float, link: float | None) -> list[str]:
    """The verdict, then a command; ``do not prune`` where no lever counts."""
    prune = found[0].counts
    codec = next((lever for lever in found[1:] if lever.counts), None)
    if not prune and codec is None:
        return ["do not prune: neither fewer blocks nor a codec saves enough here"]
    words = ["pdtrim", "plan", model, "-o", "plan.json"]
    words += ["--prefill-remove", f"{remove:g}" if prune else "0"]
    if codec is not None and codec.compression is not None:
        words += ["--kv-compression", f"{codec.compression:.3g}"]
        if link is not None:
            words += ["--link-gbit-s", f"{link:.4g}"]
    what = ["fewer blocks in prefill"] if prune else []
    what += [] if codec is None else [f"a codec ({codec.name.removeprefix('codec ')})"]
    return [f"worth a plan: {' and '.join(what)}", shlex.join(words)]
