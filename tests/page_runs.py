"""Small runs for the page, whose names try to be script."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cost_files import codec_data, plan_data, times_data, write
from pdtrim.verbs.roi import RoiConfig, estimate_roi

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=document.title='owned'>"
)
TABLE = "| block | prefill | decode |\n|---|---|---|\n| 0 | 0.5 | 1.25 |\n| 1 | 0.00001 | 0.03 |\n"


def row(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": name, "settings": "", "kl": 0.0, "kl_error": 0.0, "nll": 2.0, "ppl": 7.4,
        "kv_bytes": 8e6, "kv_compression": 1.0, "prefill_flops_ratio": 1.0,
        "decode_flops_ratio": 1.0, "prefill_blocks": 4, "decode_blocks": 4,
        "search_block_tokens": 0, "wall_s": 0.0, "answer": None,
    } | changes  # fmt: skip


def result_data() -> dict[str, Any]:
    return {
        "schema": "pdtrim.result/1",
        "provenance": {
            "model": HOSTILE, "model_fingerprint": "0" * 64, "dtype": "bfloat16",
            "text": "held.jsonl", "sequences": 4, "prompt_tokens": 64, "continuation_tokens": 32,
            "plan_digests": ["a" * 64], "versions": {"pdtrim": "0.1.0"},
            "host": {"processor": "a test's"},
        },
        "rows": [
            row("dense", answer="Paris is the capital of France."),
            row(HOSTILE, kl=0.02, kl_error=0.001, kv_bytes=2e6, answer=HOSTILE),
            row("worse", kl=0.03, kv_bytes=3e6),
        ],
    }  # fmt: skip


def roi_data(folder: Path) -> dict[str, Any]:
    """Of a real call; dense and pruned both meet the targets."""
    config = RoiConfig(
        system="bench_sxm", isl=1000, osl=100, rate=40.0, ttft=2.0, tpot=0.02, link_gbit_s=1.0,
        gpu_hour=2.5, gpu_watts=700.0, kv_bytes_per_token=100.0,
        stages=str(write(folder / "times.json", times_data())),
        codecs=(str(write(folder / "codec.json", codec_data())),),
    )  # fmt: skip
    return estimate_roi(write(folder / "plan.json", plan_data()), config)


def hostile_runs(folder: Path) -> list[str]:
    """A plan, a roi, a result and a sensitivity."""
    plan = plan_data()
    plan["model"]["name"] = HOSTILE
    folder.mkdir(exist_ok=True)
    maps = folder / "maps"
    maps.mkdir()
    write(maps / "table.md", TABLE)
    roi = write(folder / "roi.json", json.dumps(roi_data(folder)))
    result = write(folder / "result.json", json.dumps(result_data()))
    hostile = write(folder / "hostile.json", json.dumps(plan))
    return [str(path) for path in (hostile, roi, result, maps)]
