"""Small files of the cost model: a linear machine, a plan, codec speeds, metrics and traces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pdtrim.cost.handover import CodecFile
from pdtrim.cost.pair import PairCost, read_pair
from pdtrim.cost.service import Link, Service
from pdtrim.cost.times import StageTimes

LAYERS = 4
SHAPE = {
    "name": "tiny", "layers": LAYERS, "hidden": 64, "neurons": 128, "heads": 4, "kv_heads": 2,
    "head_dim": 16, "parameters": 1_000_000,
}  # fmt: skip


def times_data(**changes: Any) -> dict[str, Any]:
    """A prompt takes 100 us a token, a step 1 ms and 10 us a sequence and 1 us a context token."""
    return {
        "schema": "pdtrim.stage-times/1",
        "source": "a test's machine",
        "system": "bench_sxm",
        "gpu_memory_bytes": 100_000_000,
        "model": SHAPE,
        "prefill": [
            {
                "tokens": n, "seconds": n * 1e-4, "attention_s": n * 4e-5, "mlp_s": n * 4e-5,
                "kv_s": n * 1e-5,
            }
            for n in (10, 1000, 4000)
        ],
        "decode": [
            {
                "rows": r, "context": c, "seconds": 1e-3 + r * 1e-5 + c * 1e-6,
                "attention_s": 4e-4 + c * 1e-6, "mlp_s": 4e-4,
            }
            for r in (1, 8, 32)
            for c in (10, 2000, 8000)
        ],
    } | changes  # fmt: skip


def times(**changes: Any) -> StageTimes:
    return StageTimes.model_validate(times_data(**changes))


def plan_data(**changes: Any) -> dict[str, Any]:
    """Prefill lost block 2 but for its keys and values; all layers travel as int4."""
    return {
        "schema": "pdtrim.plan/1",
        "model": {
            "name": "tiny", "revision": None, "family": "llama", "num_layers": LAYERS,
            "num_kv_heads": 2, "head_dim": 16, "fingerprint": "0" * 64,
        },
        "gates": {
            "prefill_attention": ["full", "full", "kv", "full"],
            "prefill_mlp": [True, True, False, True],
            "decode_attention": [True] * LAYERS,
            "decode_mlp": [True] * LAYERS,
        },
        "kv": [
            {"selector": {"name": "full"}, "codec": {"name": "int", "k_bits": 4, "v_bits": 4}}
        ] * LAYERS,
        "provenance": {
            "method": "test", "mode": "projected", "seed": 0, "calibration": "none",
            "calibration_hash": "0" * 64, "search_block_tokens": 0, "wall_s": 3600,
        },
    } | changes  # fmt: skip


def codec_data(raw_bytes: int = 10**6) -> dict[str, Any]:
    """int4 at 4x, 10 GB/s in and 20 GB/s out."""
    speed = {"codec": "int4", "compression": 4.0, "encode_gb_s": 10.0, "decode_gb_s": 20.0}
    return {"raw_bytes": raw_bytes, "hardware": "a test's machine", "codecs": [speed]}


def write(path: Path, data: Any) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def codec_file(folder: Path, raw_bytes: int = 10**6) -> CodecFile:
    return CodecFile.load(write(folder / f"codec{raw_bytes}.json", codec_data(raw_bytes)))


def service(folder: Path, *, dense: bool = False, gbit_s: float = 10.0, **link: Any) -> Service:
    pair = PairCost.dense(LAYERS) if dense else read_pair(write(folder / "plan.json", plan_data()))
    return Service(
        pair=pair,
        times=times(),
        link=Link(gbit_s=gbit_s, **link),
        codecs=[codec_file(folder)],
    )


def prometheus(**means: float) -> str:
    """Text of a server whose histograms have seen 10 requests with these means."""
    lines = []
    for name, mean in means.items():
        full = name.replace("__", ":")
        lines.append(f"# TYPE {full} histogram")
        labels = '{engine="0",model_name="org/model"'
        lines.append(f'{full}_bucket{labels},le="+Inf"}} 10.0')
        lines += [f"{full}_count{labels}}} 10.0", f"{full}_sum{labels}}} {mean * 10}"]
    return "\n".join(lines) + "\n"


def pair_metrics(folder: Path, **decode: float) -> list[str]:
    """Files of a prefill and a decode server."""
    first = prometheus(
        vllm__request_queue_time_seconds=0.1, vllm__request_prefill_time_seconds=0.4,
        vllm__request_decode_time_seconds=0.0, vllm__request_prompt_tokens=4000,
        vllm__request_generation_tokens=1,
    )  # fmt: skip
    second = prometheus(
        **{
            "vllm__request_queue_time_seconds": 0.25, "vllm__request_prefill_time_seconds": 0.01,
            "vllm__request_decode_time_seconds": 0.99, "vllm__request_prompt_tokens": 4000,
            "vllm__request_generation_tokens": 100, "vllm__nixl_xfer_time_seconds": 0.2,
            "vllm__nixl_post_time_seconds": 0.0, "vllm__nixl_bytes_transferred": 250e6,
        } | decode
    )  # fmt: skip
    return [str(write(folder / "p.prom", first)), str(write(folder / "d.prom", second))]
