"""The time and the bytes of a handover: encode, send, decode, by measured codec speeds.

``pdtrim bench-codec`` writes what is read here: a codec's compression, and raw bytes a second in
each direction, at one size of cache. Layers are coded one by one. Measured at two sizes or more, a
layer's time is on the line through the two that lie around its own, so that launches count once a
layer; measured at one, it is proportional.

A handover takes ``encoding + bytes sent / link + posting + decoding``. Layers that travel raw are
neither encoded nor decoded, but every page of them is posted, by decode's own thread. What is
hidden behind prefill is the user's to say.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from pdtrim.cost.pair import PairCost
from pdtrim.cost.times import Shape
from pdtrim.errors import PdtrimError
from pdtrim.reading.json_text import read_json
from pdtrim.records import Part, first_problem, shortened

MAX_BYTES = 4 * 2**20


class CodecSpeed(Part):
    """A codec's row in a file of ``pdtrim bench-codec``, its speeds of raw bytes."""

    codec: str
    compression: float = Field(gt=0)
    encode_gb_s: float = Field(gt=0)
    decode_gb_s: float = Field(gt=0)


class _File(Part):
    raw_bytes: int = Field(gt=0)
    hardware: str = Field(max_length=500)
    codecs: tuple[CodecSpeed, ...] = Field(max_length=1000)


@dataclass(frozen=True, kw_only=True)
class CodecFile:
    """One run of ``pdtrim bench-codec``."""

    source: str
    hardware: str
    raw_bytes: int
    speeds: dict[str, CodecSpeed]

    @classmethod
    def load(cls, path: str | Path, *, source: str | None = None) -> CodecFile:
        """Read one.

        Raises:
            PdtrimError: no such file, or not what ``pdtrim bench-codec`` writes.
        """
        data: Any = read_json(path, limit=MAX_BYTES)
        try:
            file = _File.model_validate(data)
        except ValidationError as error:
            said = first_problem(error)
            raise PdtrimError(f"{path} is not of 'pdtrim bench-codec --json': {said}") from error
        return cls(
            source=source or str(path),
            hardware=file.hardware,
            raw_bytes=file.raw_bytes,
            speeds={speed.codec: speed for speed in file.codecs},
        )


@dataclass(frozen=True, kw_only=True)
class Handover:
    """Of one prompt, in seconds and bytes."""

    encode_s: float
    wire_s: float
    post_s: float
    decode_s: float
    sent_bytes: float
    raw_bytes: float
    sources: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """One after the other."""
        return self.encode_s + self.wire_s + self.held_s

    @property
    def held_s(self) -> float:
        """That decode answers nobody."""
        return self.post_s + self.decode_s


@dataclass(frozen=True, kw_only=True)
class Link:
    """What lies between the stages.

    Attributes:
        gbit_s: of each prefill server.
        overlap: the share of a handover that is hidden behind its prefill.
        bytes_per_token: that travel, where the user knows better than the plan.
        page_tokens: of a page; each page of a raw layer is posted for itself.
        page_s: seconds that posting one takes.
    """

    gbit_s: float
    overlap: float = 0.0
    bytes_per_token: float | None = None
    page_tokens: int = 16
    page_s: float = 0.0


def handover(
    pair: PairCost,
    shape: Shape,
    tokens: float,
    *,
    itemsize: int,
    link: Link,
    files: Sequence[CodecFile],
) -> Handover:
    """What handing over a prompt of ``tokens`` takes.

    Raises:
        PdtrimError: a codec that none of the files has.
    """
    layer_bytes = shape.layer_pairs * itemsize
    encode = decode = sent_bytes = pages = 0.0
    sources: dict[str, None] = {}
    for (codec, kept), layers in Counter((s.codec, s.kept(tokens)) for s in pair.sent).items():
        raw = layers * kept * layer_bytes
        if codec == "raw":
            sent_bytes += raw
            pages += layers * math.ceil(kept / link.page_tokens)
            continue
        coded = coding(codec, raw, layers, files)
        encode, decode = encode + coded.encode_s, decode + coded.decode_s
        sent_bytes += raw / coded.compression
        sources[f"{codec}: {coded.source}"] = None
    if link.bytes_per_token is not None:
        sent_bytes = link.bytes_per_token * tokens
        sources["bytes sent: --kv-bytes-per-token"] = None
    return Handover(
        encode_s=encode,
        wire_s=sent_bytes * 8 / (link.gbit_s * 1e9),
        post_s=pages * link.page_s,
        decode_s=decode,
        sent_bytes=sent_bytes,
        raw_bytes=len(pair.sent) * layer_bytes * tokens,
        sources=tuple(sources),
    )


@dataclass(frozen=True, kw_only=True)
class Coding:
    """Seconds of one cache through a codec, in both directions."""

    encode_s: float
    decode_s: float
    compression: float
    source: str


def coding(codec: str, raw: float, layers: int, files: Sequence[CodecFile]) -> Coding:
    """What ``raw`` bytes of so many layers take.

    Raises:
        PdtrimError: none of the files has the codec.
    """
    having = sorted(
        (file for file in files if codec in file.speeds), key=lambda file: file.raw_bytes
    )
    if not having:
        where = ", ".join(file.source for file in files) or "no file for this system"
        raise PdtrimError(
            f"codec '{shortened(codec)}' is not measured ({where}): run 'pdtrim bench-codec"
            f" --codec {shortened(codec)} --json' there and give its output with --codecs"
        )
    layer, sizes = raw / layers, [file.raw_bytes for file in having]
    above = min(max(bisect_left(sizes, layer), 1), len(sizes) - 1)
    read = having[max(above - 1, 0) : above + 1]
    speeds = [file.speeds[codec] for file in read]
    points = [file.raw_bytes for file in read]
    return Coding(
        encode_s=layers * _on_line(points, [speed.encode_gb_s for speed in speeds], layer),
        decode_s=layers * _on_line(points, [speed.decode_gb_s for speed in speeds], layer),
        compression=speeds[-1].compression,
        source=", ".join(
            f"{file.source} ({file.hardware}, {file.raw_bytes:,} bytes)" for file in read
        ),
    )


def _on_line(sizes: list[int], gb_s: list[float], layer: float) -> float:
    """Seconds of a layer on the line through one or two measured sizes."""
    seconds = [size / (speed * 1e9) for size, speed in zip(sizes, gb_s, strict=True)]
    if len(sizes) == 1 or sizes[0] == sizes[1]:
        return layer * seconds[-1] / sizes[-1]
    slope = max(0.0, (seconds[1] - seconds[0]) / (sizes[1] - sizes[0]))
    return max(0.0, seconds[0] + slope * (layer - sizes[0]))
