"""KL of the cache formats that vLLM 0.32 offers by ``--kv-cache-dtype``, on a sweep's own text.

    python engine_formats.py MODEL --text FILE -o formats.json

The prompt's keys and values go through a format's arithmetic, written here in plain torch after
vLLM's own kernels, and decode goes on from them, as in ``pdtrim kv-sweep``. vLLM would round the
continuation's pairs too. Bytes are those of its cache layout, nothing added. No scales are
calibrated: ``fp8`` is a cast, as vLLM does it where a checkpoint brings none. Not here:
``fp8_inc`` and ``*_ds_mla`` (other hardware, other attention), ``ultraquant_4bit`` and
``nvfp4_4over6``.

Shapes: B rows, G KV heads, N tokens, D head width, C continuation tokens.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pdtrim.calibration.batches import text_batch
from pdtrim.kv.codecs.hadamard import hadamard
from pdtrim.kv.groups import HeadGroup
from pdtrim.kv.policy import HandoverPolicy, hand_over, whole
from pdtrim.kvfit.observed import Observed
from pdtrim.kvfit.policy import parse_policy
from pdtrim.models.loading import load_model
from pdtrim.models.model import Model
from pdtrim.stage.forward import Batch, decode_stream
from pdtrim.versions import host, versions

Round = Callable[[Tensor], Tensor]
"""Through a format and back, fp32."""
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BORDER = 2  # first and last layers that TurboQuant leaves in bf16


@dataclass(frozen=True, kw_only=True)
class Format:
    """A cache format.

    Attributes:
        k_bytes, v_bytes: of a token's key and value in one head, for a head width of 64.
        border: layers at each end that stay in bf16.
    """

    k: Round
    v: Round
    k_bytes: float
    v_bytes: float
    border: int = 0

    def compression(self, layers: int, width: int) -> float:
        """Against bf16."""
        whole = 4.0 * width
        coded = self.k_bytes + self.v_bytes
        return layers * whole / (2 * self.border * whole + (layers - 2 * self.border) * coded)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Eight-bit floats without a scale; beyond their range the largest."""
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype).float()


def symmetric(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Eight bits with a scale a token and head."""
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = (x.abs().amax(-1, keepdim=True) / largest).clamp_min(1e-6)
    code = x / scale
    return scale * (code.round() if dtype == torch.int8 else cast(code, dtype))


def uniform(x: Tensor, bits: int) -> Tensor:
    """A minimum and a step in fp16 a token and head, as TurboQuant's values have."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-8)
    code = ((x - low) / step).round().clamp(0, 2**bits - 1)
    return code * step.half().float() + low.half().float()


def int4_turned(x: Tensor) -> Tensor:
    """Turned by signs and a Hadamard matrix, then four bits with a step and a zero in 0..15."""
    width = x.shape[-1]
    sign = torch.randint(0, 2, (width,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    y = hadamard(x * sign)
    low, high = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)
    step = ((high - low) / 15).clamp_min(1e-6)
    zero = (-low / step).round().clamp(0, 15)
    code = (y / step + zero).round().clamp(0, 15)
    return hadamard((code - zero) * step) * sign


def nvfp4(x: Tensor) -> Tensor:
    """FP4 with an e4m3 scale for 16 values, and no scale above it."""
    y = x.unflatten(-1, (-1, 16))
    scale = cast(y.abs().amax(-1, keepdim=True) / 6, E4M3).clamp_min(2.0**-9)
    grid = torch.tensor(FP4)
    near = torch.bucketize((y / scale).abs(), (grid[1:] + grid[:-1]) / 2)
    return (grid[near] * y.sign() * scale).flatten(-2)


def turned_book(x: Tensor, bits: int) -> Tensor:
    """TurboQuant's keys: a norm in fp16, the rest turned and in a Gaussian's code book."""
    width = x.shape[-1]
    norm = x.norm(dim=-1, keepdim=True)
    book = gaussian_book(bits) / math.sqrt(width)
    y = book[torch.bucketize(hadamard(x / (norm + 1e-8)).contiguous(), (book[1:] + book[:-1]) / 2)]
    y = y / (y.norm(dim=-1, keepdim=True) + 1e-8)
    return norm.half().float() * hadamard(y)


def gaussian_book(bits: int) -> Tensor:
    """Lloyd's levels for a unit Gaussian."""
    x = torch.linspace(-6, 6, 48001, dtype=torch.float64)
    density = torch.exp(-(x**2) / 2)
    levels = torch.linspace(-2.5, 2.5, 2**bits, dtype=torch.float64)
    for _ in range(500):
        cell = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
        mass = torch.zeros_like(levels).index_add_(0, cell, density)
        levels = torch.zeros_like(levels).index_add_(0, cell, density * x) / mass
    return levels.float()


def both(through: Round, size: float) -> Format:
    """Keys and values alike."""
    return Format(k=through, v=through, k_bytes=size, v_bytes=size)


def turbo(keys: Round, k_bytes: float, v_bits: int) -> Format:
    """TurboQuant's, of a head width of 64."""
    values = partial(uniform, bits=v_bits)
    v_bytes = 64 * v_bits / 8 + 4
    return Format(k=keys, v=values, k_bytes=k_bytes, v_bytes=v_bytes, border=BORDER)


FORMATS = {
    "fp8 (e4m3)": both(partial(cast, dtype=E4M3), 64),
    "fp8_e5m2": both(partial(cast, dtype=E5M2), 64),
    "fp8_per_token_head": both(partial(symmetric, dtype=E4M3), 68),
    "int8_per_token_head": both(partial(symmetric, dtype=torch.int8), 68),
    "int4_per_token_head": both(int4_turned, 36),
    "nvfp4": both(nvfp4, 36),
    "turboquant_k8v4": turbo(partial(cast, dtype=E4M3), 64, 4),
    "turboquant_4bit_nc": turbo(partial(turned_book, bits=4), 34, 4),
    "turboquant_k3v4_nc": turbo(partial(turned_book, bits=3), 26, 4),
    "turboquant_3bit_nc": turbo(partial(turned_book, bits=3), 26, 3),
}


OURS = {
    "int4": "full+int4",
    "int4, rotated": "full+int4:rotate=true",
    "entropy 0.4/0.9": "full+entropy:k_step=0.4,v_step=0.9",
}
"""pdtrim's codecs."""


def handed_over(model: Model, seen: Observed, name: str) -> list[list[HeadGroup]]:
    """What decode reads of a prompt, layer by layer."""
    views = [seen.view(layer) for layer in range(model.num_layers)]
    if name in OURS:
        rules = parse_policy(OURS[name]).resolve(model, seen.batch)
        policy = HandoverPolicy(rules=rules)
        return [hand_over(policy, layer, view) for layer, view in enumerate(views)]
    form, handed = FORMATS[name], []
    for layer, view in enumerate(views):
        group = whole(view)
        if form.border <= layer < model.num_layers - form.border:
            k, v = form.k(group.k_BgMD.float()), form.v(group.v_BgMD.float())
            group = replace(group, k_BgMD=k.to(model.dtype), v_BgMD=v.to(model.dtype))
        handed.append([group])
    return handed


@torch.inference_mode()
def kls(model: Model, batch: Batch, names: list[str]) -> dict[str, float]:
    """Mean KL to the dense model on a continuation, of each format."""
    seen = Observed.of(model, batch)
    logp_CV = F.log_softmax(model.head(seen.trace[-1][1])[0], -1, dtype=torch.float32)
    found = {}
    for name in names:
        handed = handed_over(model, seen, name)
        y_BCE = decode_stream(model, batch, handed, seen.trace[0][1])
        logq_CV = F.log_softmax(model.head(y_BCE)[0], -1, dtype=torch.float32)
        found[name] = float((logp_CV.exp() * (logp_CV - logq_CV)).sum(-1).mean())
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--formats", default=";".join((*FORMATS, *OURS)))
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    model = load_model(args.model, dtype="bfloat16")
    assert model.head_dim == 64  # the formats' bytes
    batch = text_batch(
        model, args.text, prompt_tokens=512, continuation_tokens=256, limit=args.limit
    )
    rows = []
    for part in batch.parts(1):
        rows.append(kls(model, part, args.formats.split(";")))
        report(model, rows, args.output)


def report(model: Model, rows: list[dict[str, float]], output: Path) -> None:
    """The table and the file, of the sequences that are measured by now."""
    made = {}
    print("\n| format | compression | KL |\n|---|---|---|")
    for name in rows[0]:
        kl_n = torch.tensor([row[name] for row in rows])
        form = FORMATS.get(name)
        size = f"{form.compression(model.num_layers, model.head_dim):.2f}x" if form else ""
        error = float(kl_n.std(correction=min(1, len(rows) - 1))) / math.sqrt(len(rows))
        print(f"| {name} | {size} | {kl_n.mean():.4f} ± {error:.4f} |", flush=True)
        made[name] = {"compression": size, "kl": kl_n.tolist()}
    text = {"formats": made, "versions": versions(), "host": host()}
    output.write_text(json.dumps(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
