"""The time and the bytes of a handover: encode, send, decode, by measured codec speeds.

``pdtrim bench-codec`` writes what is read here: a codec's compression, and raw bytes a second in
each direction, at one size of cache. Of several files the one whose size is nearest counts.

A handover of B raw bytes takes ``B / encode + bytes sent / link + B / decode``. Layers that travel
raw are neither encoded nor decoded. What is hidden behind prefill is the user's to say.
"""

from __future__ import annotations

import math
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
    decode_s: float
    sent_bytes: float
    raw_bytes: float
    sources: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """One after the other."""
        return self.encode_s + self.wire_s + self.decode_s


def handover(
    pair: PairCost,
    shape: Shape,
    tokens: float,
    *,
    itemsize: int,
    link_gbit_s: float,
    files: Sequence[CodecFile],
    bytes_per_token: float | None = None,
) -> Handover:
    """What handing over a prompt of ``tokens`` takes.

    Args:
        bytes_per_token: that travel, where the user knows; the codecs' time is still theirs.

    Raises:
        PdtrimError: a codec that none of the files has.
    """
    layer_bytes = shape.layer_pairs * itemsize
    by_codec: dict[str, float] = {}
    for sent in pair.sent:
        kept = sent.kept(tokens) * layer_bytes
        by_codec[sent.codec] = by_codec.get(sent.codec, 0.0) + kept
    encode = decode = sent_bytes = 0.0
    sources: list[str] = []
    for codec, raw in by_codec.items():
        if codec == "raw":
            sent_bytes += raw
            continue
        file, speed = _speed(codec, raw, files)
        encode += raw / (speed.encode_gb_s * 1e9)
        decode += raw / (speed.decode_gb_s * 1e9)
        sent_bytes += raw / speed.compression
        sources.append(f"{codec}: {file.source} ({file.hardware}, {file.raw_bytes:,} bytes)")
    if bytes_per_token is not None:
        sent_bytes = bytes_per_token * tokens
        sources.append("bytes sent: --kv-bytes-per-token")
    return Handover(
        encode_s=encode,
        wire_s=sent_bytes * 8 / (link_gbit_s * 1e9),
        decode_s=decode,
        sent_bytes=sent_bytes,
        raw_bytes=len(pair.sent) * layer_bytes * tokens,
        sources=tuple(sources),
    )


def _speed(codec: str, raw: float, files: Sequence[CodecFile]) -> tuple[CodecFile, CodecSpeed]:
    having = [file for file in files if codec in file.speeds]
    if not having:
        where = ", ".join(file.source for file in files) or "no file for this system"
        raise PdtrimError(
            f"codec '{shortened(codec)}' is not measured ({where}): run 'pdtrim bench-codec"
            f" --codec {shortened(codec)} --json' there and give its output with --codecs"
        )
    nearest = min(having, key=lambda file: abs(math.log(file.raw_bytes / max(raw, 1.0))))
    return nearest, nearest.speeds[codec]
