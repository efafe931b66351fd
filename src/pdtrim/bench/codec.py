"""How fast each codec encodes and decodes, and on which links that pays.

Shapes: L heads, M tokens, D head width; 2 for K and V.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from pdtrim.bench.configs import CodecsConfig
from pdtrim.bench.lanes import facts_of
from pdtrim.errors import PdtrimError
from pdtrim.kv.codecs import parse_codec
from pdtrim.kv.codecs.base import CodecBase
from pdtrim.kv.codecs.integer import rotated
from pdtrim.kv.kernels import Way, kernels_of, use
from pdtrim.kvfit.link import CodecSpeed, break_even
from pdtrim.kvfit.menu import Codecs
from pdtrim.models.loading import dtype_named
from pdtrim.progress import Progress, silent

T = TypeVar("T")

LOUD_CHANNELS = 4
LOUD = 20.0


@torch.inference_mode()
def bench_codecs(
    config: CodecsConfig = CodecsConfig(),
    *,
    way: Way | None = None,
    dtype: str = "bfloat16",
    device: str | torch.device = "cpu",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Median throughputs over interleaved runs, the same keys and values for every codec.

    GB/s count the raw bytes, ``2 L M D`` elements, whatever the codec makes of them. ``*_ratio``
    is over a plain copy of those bytes, timed in the same rounds; ``*_range`` are the GB/s of the
    slowest and of the fastest run. ``path`` is ``triton`` where kernels code on this device. The
    codec ``raw`` decodes to a view of what it is given, so that its decoding has no speed to speak
    of. A GPU's own clock counts, from before the first launch to the end of the last, so that
    launches are part of small shapes' times.

    Args:
        way: the path to code on, whatever the device.

    Returns:
        What was timed on what, and ``codecs``: for each its compression, GB/s, ratios, and the link
        speed in Gbit/s below which it pays.

    Raises:
        PdtrimError: a codec text, the dtype or a number is out of range.
    """
    heads, tokens, width = config.heads, config.tokens, config.width
    if min(heads, tokens, width, config.repeats) < 1 or not config.codecs:
        raise PdtrimError("heads, tokens, width, repeats and codecs: at least one of each")
    codecs = {name: parse_codec(name) for name in config.codecs}
    device = torch.device(device)
    kv_2LMD = sample(heads, tokens, width).to(device, dtype_named(dtype))
    raw_bytes = kv_2LMD.numel() * kv_2LMD.itemsize
    with use(way) if way else nullcontext():
        paths = {
            name: "triton" if kernels_of(codec, device, tokens, width) else "torch"
            for name, codec in codecs.items()
        }
        rounds = _rounds(codecs, kv_2LMD, config.repeats, progress)
    copy = raw_bytes / statistics.median(rounds.copies) / 1e9
    return {
        "heads": heads,
        "tokens": tokens,
        "width": width,
        "dtype": dtype,
        **facts_of(device),
        "repeats": config.repeats,
        "raw_bytes": raw_bytes,
        "copy_gb_s": copy,
        "copy_range": _range(raw_bytes, rounds.copies),
        "codecs": [
            {"codec": name, "path": paths[name]}
            | _entry(raw_bytes, rounds.coded_bytes[name], rounds.times[name], copy)
            for name in codecs
        ],
    }


@dataclass(frozen=True, kw_only=True)
class _Rounds:
    """Seconds of each round behind the one that warms up, by codec (encoding, decoding)."""

    copies: list[float]
    times: dict[str, list[tuple[float, float]]]
    coded_bytes: dict[str, int]


def _rounds(
    codecs: Mapping[str, CodecBase], kv_2LMD: Tensor, repeats: int, progress: Progress
) -> _Rounds:
    device = kv_2LMD.device
    k_LMD, v_LMD = kv_2LMD
    made = _Rounds(copies=[], times={name: [] for name in codecs}, coded_bytes={})
    with progress("timing", (repeats + 1) * (len(codecs) + 1)) as advance:
        for repeat in range(repeats + 1):  # the first round warms up
            seconds, _ = _timed(kv_2LMD.clone, device)
            if repeat:
                made.copies.append(seconds)
            advance(1)
            for name, codec in codecs.items():
                encoding, data = _timed(partial(codec.encode, k_LMD, v_LMD), device)
                shape = (*k_LMD.shape, k_LMD.dtype)
                decoding, _ = _timed(partial(codec.decode, data, *shape), device)
                made.coded_bytes[name] = data.numel()
                if repeat:
                    made.times[name].append((encoding, decoding))
                advance(1)
    return made


def codec_speeds(
    *, heads: int, tokens: int, width: int, dtype: str, device: str | torch.device
) -> dict[Codecs, CodecSpeed]:
    """How fast this machine codes a layer of a cache, by the codecs that a budget may use.

    Raises:
        PdtrimError: as :func:`bench_codecs`.
    """
    packed = f"int3:group=128,recent=0{rotated(width)}"
    names: dict[Codecs, str] = {"any": "entropy", "packed": packed}
    config = CodecsConfig(codecs=tuple(names.values()), heads=heads, tokens=tokens, width=width)
    report = bench_codecs(config, dtype=dtype, device=device)
    rows = {row["codec"]: row for row in report["codecs"]}
    return {
        codecs: CodecSpeed(
            encode_gb_s=rows[name]["encode_gb_s"], decode_gb_s=rows[name]["decode_gb_s"]
        )
        for codecs, name in names.items()
    }


def sample(heads: int, tokens: int, width: int) -> Tensor:
    """Normal fp32 ``[2, L, M, D]``, a few key channels loud as in real keys; always the same."""
    # drawn on the CPU, so that every device times the same values
    generator = torch.Generator().manual_seed(0)
    kv_2LMD = torch.randn(2, heads, tokens, width, generator=generator)
    loud = torch.randperm(width, generator=generator)[:LOUD_CHANNELS]
    kv_2LMD[0, :, :, loud] *= LOUD
    return kv_2LMD


def _entry(
    raw_bytes: int, coded_bytes: int, times: list[tuple[float, float]], copy: float
) -> dict[str, Any]:
    """One codec's row of the report."""
    encoding, decoding = zip(*times, strict=True)
    # one round's two halves are added, because on a real handover two machines do them in turn
    both = [sum(pair) for pair in times]
    parts = {"encode": encoding, "decode": decoding, "both": both}
    speeds = {part: raw_bytes / statistics.median(s) / 1e9 for part, s in parts.items()}
    compression = raw_bytes / coded_bytes
    return {
        "compression": compression,
        **{f"{part}_gb_s": speed for part, speed in speeds.items()},
        **{f"{part}_range": _range(raw_bytes, seconds) for part, seconds in parts.items()},
        **{f"{part}_ratio": speed / copy for part, speed in speeds.items()},
        "break_even_gbit_s": break_even(compression, speeds["both"]),
    }


def _range(raw_bytes: int, seconds: Sequence[float]) -> list[float]:
    """GB/s of the slowest run and of the fastest."""
    return [raw_bytes / some / 1e9 for some in (max(seconds), min(seconds))]


def _timed(run: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Seconds, and what came out; freeing the result is not part of them."""
    if device.type != "cuda":
        started = time.perf_counter()
        result = run()
        return time.perf_counter() - started, result
    with torch.cuda.device(device):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        before.record()
        result = run()
        after.record()
        after.synchronize()
    return before.elapsed_time(after) / 1000, result
