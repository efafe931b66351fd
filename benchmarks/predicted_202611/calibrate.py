"""Write the stage times of an H200 and the codec times of single layers that pdtrim keeps.

python calibrate.py    # pip install 'pdtrim[aiconfigurator]'
"""

from __future__ import annotations

import json
import statistics
from typing import Any

import numpy as np
import predict

from pdtrim.cost.aiconfigurator import aiconfigurator_times
from pdtrim.cost.kept import CODECS, STAGES, codec_files
from pdtrim.cost.pair import PairCost
from pdtrim.cost.service import Service
from pdtrim.cost.times import StageTimes


def calibrate() -> None:
    """Write the stage times of an H200 and the codec times of single layers that pdtrim keeps."""
    rows = predict.served()
    times = aiconfigurator_times("meta-llama/Meta-Llama-3.1-8B", "h200_sxm")
    busy = rows["stock128", f"{predict.PROMPT}@5"]
    at = np.array(predict.arrivals(busy["requests"], 5)) + busy["ttft_s"]
    queued = np.array(busy["ttft_s"])[1:] > 0.45
    slower = float(np.median(np.diff(at)[queued])) / times.prompt(predict.PROMPT)
    steps = {n: statistics.median(rows["stock128", str(n)]["tpot_s"]) for n in predict.PROMPTS}
    step = statistics.mean(s / times.step(1, n + predict.ANSWER / 2) for n, s in steps.items())
    own = scaled(times, slower, step)
    service = Service(
        pair=PairCost.dense(predict.LAYERS),
        times=own,
        link=predict.link(rows, 128),
        codecs=codec_files((), "h100"),
    )
    left = [
        statistics.median(rows["stock128", str(n)]["ttft_s"])
        - service.prefill_s(n) - service.handover(n).seconds
        - service.step_s(1, n, predict.ANSWER / 2)
        for n in predict.PROMPTS
    ]  # fmt: skip
    token_s, front_s = np.polyfit(predict.PROMPTS, left, 1)
    own = own.model_copy(
        update={
            "source": f"{times.source}, prefill x {slower:.3f} and decode x {step:.3f} as served in"
            " benchmarks/serving_h200_202611",
            "front_s": round(float(front_s), 5), "front_token_s": round(float(token_s), 8),
        }
    )  # fmt: skip
    text = own.model_dump_json(by_alias=True, exclude_none=True).replace("},{", "},\n  {")
    (STAGES / "llama-3.1-8b_h200_sxm.json").write_text(text + "\n", encoding="utf-8")
    layers = layer_codecs()
    (CODECS / "bench_8_3824_128.json").write_text(json.dumps(layers, indent=1) + "\n")


def scaled(times: StageTimes, prefill: float, decode: float) -> StageTimes:
    """All of a stage's seconds times a number."""

    def row(of: Any, by: float) -> Any:
        seconds = {k: v for k, v in of.model_dump().items() if k.endswith("_s") or k == "seconds"}
        made = {k: float(f"{v * by:.5g}") for k, v in seconds.items() if v is not None}
        return of.model_copy(update=made)

    return times.model_copy(
        update={
            "prefill": tuple(row(one, prefill) for one in times.prefill),
            "decode": tuple(row(one, decode) for one in times.decode),
        }
    )


def layer_codecs() -> dict[str, Any]:
    """Codecs a layer at a time, as ``bench-codec`` would write them."""
    data = json.loads(predict.HANDOVERS.read_text(encoding="utf-8"))
    raw, codecs = data["raw_bytes"], []
    sizes = {row["name"]: row["bytes"] for row in data["rows"]}
    for name, (encode, decode) in predict.layer_speeds(data).items():
        if name.startswith("full+"):
            one = {"codec": name.removeprefix("full+"), "compression": raw / sizes[name]}
            one |= {"encode_gb_s": raw / encode / 1e9, "decode_gb_s": raw / decode / 1e9}
            codecs.append(one)
    return {"raw_bytes": raw // predict.LAYERS, "hardware": data["hardware"], "codecs": codecs}


if __name__ == "__main__":
    calibrate()
