"""Ranges written from an engine's pages and read into others, as its connector does.

    python benchmarks/codec_pages.py [--device cuda] [--tokens 8192] [--codec k3v2:rotate=true ...]

32 layers of LLaMA-3.1-8B, 8 heads of 128 channels, in pages of 32 tokens as FlashAttention's lie.
A line a codec: median milliseconds until the host goes on, and until the device is done; the
checksum's and the codec's own GB/s of raw bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pdtrim.engines.ranges import NONCE_BYTES, Form, Part
from pdtrim.engines.vllm.pages_io import Rows, numbers, rows_of, slots
from pdtrim.kv.checksum import checksum
from pdtrim.kv.codecs import parse_codec
from pdtrim.kv.codecs.base import CodecBase
from pdtrim.kv.kernels import together

LAYERS, HEADS, PAGE, WIDTH = 32, 8, 32, 128
NONCE = bytes(NONCE_BYTES)
CODECS = ("k3v2:rotate=true", "int4", "int2:rotate=true", "fp8", "raw", "entropy")
BACKEND: Any = SimpleNamespace(attn_backend=SimpleNamespace(get_name=lambda: "FLASH_ATTN"))


def rows(tokens: int, device: torch.device) -> list[Rows]:
    """Random caches, with as many free pages as a prompt has."""
    shape = (2 * -(-tokens // PAGE), PAGE, HEADS, 2 * WIDTH)
    caches = [torch.randn(shape, device=device).bfloat16().transpose(1, 2) for _ in range(LAYERS)]
    found = [rows_of(BACKEND, cache, HEADS) for cache in caches]
    return [row for row in found if row is not None]


def form_of(codec: CodecBase, tokens: int) -> Form:
    """Of a prompt whose layers are alike."""
    shape = {"tokens": tokens, "heads": HEADS, "width": WIDTH, "dtype": torch.bfloat16}
    most = codec.nbytes(HEADS, tokens, WIDTH, torch.bfloat16)
    parts = [Part(layer=i, codec=codec, hole=(0, 0), most=most, **shape) for i in range(LAYERS)]
    return Form(prompt_tokens=tokens + 1, parts=tuple(parts))


def places(some: list[Rows], tokens: int, device: torch.device) -> Tensor:
    """Rows ``[Y, G, M]`` of a prompt in pages that lie in no order."""
    order = torch.randperm(2 * -(-tokens // PAGE))[: -(-tokens // PAGE)].tolist()
    return slots(numbers(order, device), PAGE, tokens, some[0].step).expand(LAYERS, HEADS, -1)


def read(form: Form, staged: Tensor, target: list[Rows], kept_YGM: Tensor) -> None:
    """Decode a range into pages, and wait for it."""
    left = [(row.k_GTD, row.v_GTD) for row in target]
    with together():
        for parts, data_YS in form.read(staged, NONCE):
            here, left = left[: len(parts)], left[len(parts) :]
            parts[0].codec.decode_layers(data_YS, here, kept_YGM[: len(parts)])


def timed(run: Callable[[], Any], device: torch.device, repeats: int) -> tuple[Any, float, float]:
    """What it made, and median ms until the host goes on and until the device is done."""
    host, whole = [], []
    for repeat in range(repeats + 2):  # the first two warm up
        wait(device)
        began = time.perf_counter()
        made = run()
        returned = time.perf_counter()
        wait(device)
        if repeat > 1:
            host.append(1e3 * (returned - began))
            whole.append(1e3 * (time.perf_counter() - began))
    return made, statistics.median(host), statistics.median(whole)


def wait(device: torch.device) -> None:
    """For what the device does."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(codec: str, tokens: int, device: torch.device, repeats: int) -> dict[str, Any]:
    """A codec's line."""
    source, target = rows(tokens, device), rows(tokens, device)
    form = form_of(parse_codec(codec), tokens)
    room = torch.zeros(form.most, dtype=torch.uint8, device=device)
    kv = [(row.k_GTD, row.v_GTD) for row in source]
    here, there = (places(some, tokens, device) for some in (source, target))
    line: dict[str, Any] = {"codec": codec}
    size, line["write_host_ms"], line["write_ms"] = timed(
        lambda: form.write(room, NONCE, [(kv, here)]), device, repeats
    )
    staged = room[:size]
    _, line["read_host_ms"], line["read_ms"] = timed(
        lambda: read(form, staged, target, there), device, repeats
    )
    _, _, summed = timed(lambda: checksum(staged), device, repeats)
    line |= {"mb": size / 1e6, "checksum_gb_s": size / summed / 1e6}
    return {key: round(x, 3) if isinstance(x, float) else x for key, x in line.items()}


def main() -> None:
    """A line a codec."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--codec", action="append")
    options = parser.parse_args()
    torch.manual_seed(0)
    for codec in options.codec or CODECS:
        line = measure(codec, options.tokens, torch.device(options.device), options.repeats)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
