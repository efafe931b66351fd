"""Prefill and decode on vLLM under load: dense, vLLM's own PD, and pairs of ours.

    python benchmarks/serving.py -o OUT [--systems stock,both] [--points ...] [--stage-arg=...]

Nothing is downloaded: the checkpoints are configs of a shape, and vLLM makes their weights up
(``--load-format dummy``), so answers mean nothing and times mean what they always do. Load comes
from vLLM's own ``bench serve``: random prompts of one length, answers of one length. A system's
servers are started once and take all points; a point whose result is there is not run again.

With two GPUs each stage has its own; with one (or none) both share it, and the result says so.
``--together 3`` starts the servers of three systems at once, which takes as long as one's. They
are asked one after another, and share the GPUs' memory: give each its part, as by
``--decode-arg=--kv-cache-memory-bytes=12G``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from servers import counters, lines_of, quantile, running, sum_of
from serving_systems import NAME, SYSTEMS, commands, distinct, write_pair
from vllm.benchmarks import serve as serve_benchmark
from vllm.utils.argparse_utils import FlexibleArgumentParser

from pdtrim.engines.base import Process
from pdtrim.versions import host, versions


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


def bench(
    url: str, tokenizer: Path, point: Point, count: int, answer: int, seed: int, out: Path
) -> dict:
    """vLLM's own load generator, and what it saw of each request."""
    words = ["--backend", "vllm", "--base-url", url]
    words += ["--model", NAME, "--tokenizer", str(tokenizer), "--dataset-name", "random"]
    words += ["--random-input-len", str(point.prompt), "--random-output-len", str(answer)]
    words += ["--num-prompts", str(count), "--ignore-eos", "--seed", str(seed)]
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
    made: list[Process], tokenizer: Path, point: Point, again: int, options: argparse.Namespace
) -> dict:
    """One point: what clients saw, what crossed, and what decode held."""
    decode = next((p.url for p in made if p.name.startswith("decode")), made[-1].url)
    count = point.requests(options.seconds, options.least)
    seed = point.prompt + count + 100_000 * again
    before = counters(decode)
    scratch = options.output / f".{os.getpid()}.json"
    with Watch(decode) as watch:
        found = bench(made[-1].url, tokenizer, point, count, options.answer, seed, scratch)
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


Load = tuple[int, Point]
"""A repetition and its point."""


def todo(options: argparse.Namespace) -> dict[str, list[Load]]:
    """What has no result yet, by system."""
    results = options.output / "results.jsonl"
    rows = [json.loads(x) for x in results.read_text().splitlines()] if results.is_file() else []
    there = {(row["system"], row["point"], row["repetition"]) for row in rows}
    points = [Point.parse(text) for text in options.points.split(",")]
    loads = [(again, point) for again in range(options.repetitions) for point in points]
    left = {
        name: [load for load in loads if (name, str(load[1]), load[0]) not in there]
        for name in options.systems.split(",")
    }
    return {name: of for name, of in left.items() if of}


def run(left: dict[str, list[Load]], options: argparse.Namespace) -> None:
    """Systems whose servers stand side by side, a repetition of each and then the next."""
    port = distinct()
    made = {}
    for name in left:
        folder = options.output / "pairs" / name
        if not folder.exists():
            write_pair(SYSTEMS[name], options.shape, folder)
        made[name] = commands(SYSTEMS[name], folder, port, options)
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(len(made)) as pool:
        began = time.monotonic()

        def start(name: str) -> str | None:
            """Its servers, to the end of all; None if they do not start."""
            servers = running(made[name], options.output / f"{name}.log", options.start_seconds)
            try:
                stack.enter_context(servers)
            except Exception as error:  # the others may still be measured
                say(f"{name}: {type(error).__name__}: {error}")
                return None
            say(f"{name}: serves after {time.monotonic() - began:.0f} s")
            return name

        up = [name for name in pool.map(start, left) if name]
        for name in up:
            warm = Point(prompt=max(point.prompt for _, point in left[name]), rate=None)
            tokenizer = options.output / "pairs" / name / "decode"
            bench(made[name][-1].url, tokenizer, warm, 2, 8, 1, options.output / ".warm.json")
        for again in range(options.repetitions):
            for name in up:
                for _, point in (load for load in left[name] if load[0] == again):
                    take(name, made[name], point, again, up, options)


def take(
    name: str,
    made: list[Process],
    point: Point,
    again: int,
    up: list[str],
    options: argparse.Namespace,
) -> None:
    """Measure a point and keep it."""
    row = measure(made, options.output / "pairs" / name / "decode", point, again, options)
    row = {"system": name, "point": str(point), "repetition": again, "beside": up,
           **about(options), **row}  # fmt: skip
    with (options.output / "results.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    ttft, tpot = (quantile(row[key], 0.5) * 1e3 for key in ("ttft_s", "tpot_s"))
    handover = row["handover"].get("handover_s", 0.0) * 1e3
    say(
        f"{name} {point}: {row['answered']} of {row['requests']} answered, TTFT {ttft:.0f} ms,"
        f" TPOT {tpot:.2f} ms, handover {handover:.1f} ms"
    )


def about(options: argparse.Namespace) -> dict[str, Any]:
    """What a row was measured on."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "shape": options.shape,
        "answer": options.answer,
        "gpus": gpus,
        "stage_args": options.stage_arg,
        "prefill_args": options.prefill_arg,
        "decode_args": options.decode_arg,
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
    parser.add_argument("--prefill-arg", action="append", default=[])
    parser.add_argument("--decode-arg", action="append", default=[])
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--together", type=int, default=1, help="systems started at once")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    names = list(todo(options))
    for first in range(0, len(names), options.together):
        batch = names[first : first + options.together]
        try:
            run({name: todo(options)[name] for name in batch}, options)
        except Exception as error:  # the next systems may still be measured
            say(f"{', '.join(batch)}: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
