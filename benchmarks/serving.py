"""Prefill and decode on vLLM under load: dense, vLLM's own PD, and pairs of ours.

    python benchmarks/serving.py -o OUT [--systems stock,both] [--points ...] [--stage-arg=...]

Nothing is downloaded: the checkpoints are configs of a shape, and vLLM makes their weights up
(``--load-format dummy``), so answers mean nothing and times mean what they always do. Load comes
from vLLM's own ``bench serve``: random prompts of one length, answers of one length. A system's
servers are started once and take all points; a point whose result is there is not run again.

With two GPUs each stage has its own; with one (or none) both share it, and the result says so.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from servers import counters, lines_of, running, sum_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from vllm.benchmarks import serve as serve_benchmark
from vllm.utils.argparse_utils import FlexibleArgumentParser

from pdtrim.bench.removal import removing
from pdtrim.bench.shapes import shape_config
from pdtrim.bundle import TrimPlan
from pdtrim.engines.base import Process
from pdtrim.engines.config import ServeConfig
from pdtrim.engines.vllm.launch import free_port, processes
from pdtrim.kv.codecs import parse_codec
from pdtrim.kv.selectors import FirstLast
from pdtrim.models.checkpoint import WEIGHTS, seal, write_stage_config
from pdtrim.models.model import Model
from pdtrim.plan import STAGES, Gates, LayerKV
from pdtrim.versions import host, versions

NAME = "m"


@dataclass(frozen=True, kw_only=True)
class System:
    """What is served.

    Attributes:
        ours: pdtrim's connector; vLLM's own NIXL connector if not.
        pd: two stages; one server that does both if not.
        removed: share of prefill's blocks that only make keys and values.
        codec: of every layer.
        trimmed: share of layers under ``first_last`` of 256 and 1,792 tokens.
        page: tokens of a page; None is the default of pdtrim, or of vLLM.
    """

    ours: bool = True
    pd: bool = True
    removed: float = 0.0
    codec: str = "raw"
    trimmed: float = 0.0
    page: int | None = None


CODEC = "k3v2:rotate=true"
SYSTEMS = {
    "stock": System(ours=False),
    "stock128": System(ours=False, page=128),
    "pruned": System(removed=1 / 3),
    "coded": System(codec=CODEC),
    "both": System(removed=1 / 3, codec=CODEC),
    "trimmed": System(removed=1 / 3, codec=CODEC, trimmed=0.5),
    "dense": System(ours=False, pd=False),
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One load: prompts of so many tokens, one after another or at a rate (requests a second)."""

    prompt: int
    rate: float | None

    @classmethod
    def parse(cls, text: str) -> Point:
        """``8192`` or ``8192@3.5``."""
        prompt, _, rate = text.partition("@")
        return cls(prompt=int(prompt), rate=float(rate) if rate else None)

    def __str__(self) -> str:
        return f"{self.prompt}" + (f"@{self.rate:g}" if self.rate else "")

    def requests(self, seconds: float, least: int) -> int:
        """How many make the point last so long."""
        return least if self.rate is None else max(least, round(self.rate * seconds))


def write_tokenizer(vocabulary: int, folder: Path) -> None:
    """A word a token, so that texts and token counts agree whatever the model says."""
    words = {f"w{i}": i for i in range(vocabulary)}
    raw = Tokenizer(models.WordLevel(words, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="w0").save_pretrained(folder)


def write_pair(system: System, shape: str, folder: Path) -> None:
    """Both checkpoints of a system without their weights."""
    config = shape_config(shape)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = Model(network, name=shape)
    vars(model)["fingerprint"] = hashlib.sha256(shape.encode()).hexdigest()  # it has no weights
    layers = model.num_layers
    gates = Gates.dense(layers).without_dead_work()
    if system.removed:
        gates = removing(layers, round(system.removed * layers))[0]
    codec = parse_codec(system.codec)
    rule = FirstLast(first=256, last=1792)
    cut = (
        {round(i / system.trimmed) for i in range(round(system.trimmed * layers))}
        if (system.trimmed)
        else set()
    )
    kv = tuple(
        LayerKV(selector=rule, codec=codec) if i in cut else LayerKV(codec=codec)
        for i in range(layers)
    )
    changes: dict[str, Any] = {"gates": gates, "kv": kv}
    if cut:
        changes["block_size"] = 32
    plan = TrimPlan.dense(model).plan.model_copy(update=changes)
    for stage in STAGES:
        write_tokenizer(config.vocab_size, folder / stage)
        save_file({}, folder / stage / WEIGHTS)
        write_stage_config(model, plan, stage, folder / stage)
    seal({stage: folder / stage for stage in STAGES})


def started(system: System, folder: Path, options: argparse.Namespace) -> list[Process]:
    """The processes of a system, the one that is asked last."""
    config = ServeConfig(
        pair=folder,
        port=free_port(),
        name=NAME,
        max_model_len=options.max_model_len,
        prefill_args=("--load-format", "dummy", *options.stage_arg),
        decode_args=("--load-format", "dummy", *options.stage_arg),
    )
    made = [uncached(process) for process in processes(config, free_port=free_port)]
    if system.ours:
        return made
    servers = [stock(process, folder / "decode", system) for process in made[:2]]
    if system.pd:
        return [*servers, made[2]]
    return servers[1:]  # both stages are whole


def uncached(process: Process) -> Process:
    """Without a prefix cache: the load generator sends one of its prompts twice."""
    flag = "--no-enable-prefix-caching"
    if process.name == "router" or flag in process.command:
        return process
    return replace(process, command=(*process.command, flag))


def stock(process: Process, dense: Path, system: System) -> Process:
    """The same server as a user of plain vLLM starts it, with one model for both stages."""
    words = list(process.command)
    words[words.index("--model") + 1] = str(dense)
    for flag in ("--hf-overrides", "--block-size", "--kv-transfer-config"):
        at = words.index(flag)
        if flag != "--kv-transfer-config":
            del words[at : at + 2]
        elif system.pd:
            role = json.loads(words[at + 1])["kv_role"]
            words[at + 1] = json.dumps({"kv_connector": "NixlConnector", "kv_role": role})
        else:
            del words[at : at + 2]
    if system.page:
        words += ["--block-size", str(system.page)]
    return replace(process, command=tuple(words))


class Watch:
    """The share of a server's KV pages that are taken, every quarter of a second."""

    def __init__(self, url: str) -> None:
        self.url, self.seen, self._stop = url, [], threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.25):
            with contextlib.suppress(OSError):
                self.seen.append(sum_of(lines_of(self.url), "vllm:kv_cache_usage_perc"))


def bench(url: str, tokenizer: Path, point: Point, count: int, answer: int, out: Path) -> dict:
    """vLLM's own load generator, and what it saw of each request."""
    words = ["--backend", "vllm", "--base-url", url]
    words += ["--model", NAME, "--tokenizer", str(tokenizer), "--dataset-name", "random"]
    words += ["--random-input-len", str(point.prompt), "--random-output-len", str(answer)]
    words += ["--num-prompts", str(count), "--ignore-eos", "--seed", str(point.prompt + count)]
    words += ["--request-rate", str(point.rate or "inf"), "--disable-tqdm"]
    words += ["--save-result", "--save-detailed", "--result-dir", str(out.parent)]
    words += ["--result-filename", out.name, "--num-warmups", "1"]
    if point.rate is None:
        words += ["--max-concurrency", "1"]
    parser = FlexibleArgumentParser()
    serve_benchmark.add_cli_args(parser)
    with contextlib.redirect_stdout(io.StringIO()):
        serve_benchmark.main(parser.parse_args(words))
    found = json.loads(out.read_text())
    out.unlink()
    return found


def measure(
    made: list[Process], tokenizer: Path, point: Point, options: argparse.Namespace
) -> dict:
    """One point: what clients saw, what crossed, and what decode held."""
    decode = next((p.url for p in made if p.name.startswith("decode")), made[-1].url)
    count = point.requests(options.seconds, options.least)
    before = counters(decode)
    scratch = options.output / f".{os.getpid()}.json"
    with Watch(decode) as watch:
        found = bench(made[-1].url, tokenizer, point, count, options.answer, scratch)
    counted = {key: value - before[key] for key, value in counters(decode).items()}
    handovers = counted.pop("handovers")
    pages = next(x for x in lines_of(decode) if x.startswith("vllm:cache_config_info{"))
    answered = [i for i, error in enumerate(found["errors"]) if not error]
    return {
        "requests": count,
        "answered": len(answered),
        "seconds": found["duration"],
        "ttft_s": [found["ttfts"][i] for i in answered],
        "tpot_s": [sum(found["itls"][i]) / max(1, options.answer - 1) for i in answered],
        "itl_s": {q: quantile([x for i in answered for x in found["itls"][i]], q / 100)
                  for q in (50, 90, 99)},
        "handover": {key: value / handovers for key, value in counted.items()} if handovers else {},
        "decode_pages": int(pages.split('num_gpu_blocks="')[1].split('"')[0]),
        "decode_share": {"mean": sum(watch.seen) / max(1, len(watch.seen)),
                         "most": max(watch.seen, default=0.0)},
    }  # fmt: skip


def quantile(values: list[float], q: float) -> float:
    """Between the two nearest."""
    return float(torch.tensor(values or [0.0], dtype=torch.float64).quantile(q))


def run(name: str, points: list[Point], options: argparse.Namespace) -> None:
    """All points of a system that have no result yet."""
    results = options.output / "results.jsonl"
    rows = [json.loads(x) for x in results.read_text().splitlines()] if results.is_file() else []
    there = {(row["system"], row["point"]) for row in rows}
    todo = [point for point in points if (name, str(point)) not in there]
    if not todo:
        return
    system, folder = SYSTEMS[name], options.output / "pairs" / name
    if not folder.exists():
        write_pair(system, options.shape, folder)
    made = started(system, folder, options)
    began = time.monotonic()
    with running(made, options.output / f"{name}.log", options.start_seconds):
        say(f"{name}: serves after {time.monotonic() - began:.0f} s")
        warm = Point(prompt=max(p.prompt for p in todo), rate=None)
        bench(made[-1].url, folder / "decode", warm, 2, 8, options.output / ".warm.json")
        for point in todo:
            row = measure(made, folder / "decode", point, options)
            row = {"system": name, "point": str(point), **about(options), **row}
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            ttft, tpot = (quantile(row[key], 0.5) for key in ("ttft_s", "tpot_s"))
            say(f"{name} {point}: {row['answered']} of {row['requests']} answered, TTFT"
                f" {ttft * 1e3:.0f} ms, TPOT {tpot * 1e3:.2f} ms")  # fmt: skip


def about(options: argparse.Namespace) -> dict[str, Any]:
    """What a row was measured on."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "shape": options.shape,
        "answer": options.answer,
        "gpus": gpus,
        "stage_args": options.stage_arg,
        "date": time.strftime("%Y-%m-%d"),
        "host": host(),
        "versions": versions(),
    }


def say(text: str) -> None:
    """To the person who waits."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Read the options and take the systems in order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--points", default="2048,8192,16384,8192@1,8192@2,8192@3,8192@4,8192@5")
    parser.add_argument("--answer", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=25, help="of a point with a rate")
    parser.add_argument("--least", type=int, default=8, help="requests of a point")
    parser.add_argument("--max-model-len", type=int, default=17408)
    parser.add_argument("--start-seconds", type=float, default=600)
    parser.add_argument("--stage-arg", action="append", default=[], help="for vLLM's servers")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    points = [Point.parse(text) for text in options.points.split(",")]
    for name in options.systems.split(","):
        try:
            run(name, points, options)
        except Exception as error:  # the next system may still be measured
            say(f"{name}: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
