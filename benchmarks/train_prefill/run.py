"""What training prefill's projections gives back: a plan bare, repaired and trained, and dense.

    python run.py --model FOLDER --data DATA --out OUT --remove 17,18,20 --minutes 5 --device cuda

DATA is a folder of tasks and text (docs/tasks.md): DATA/c4/train.jsonl is trained on, and measured
are LAMBADA's last words and the exact KL on DATA/c4/valid.jsonl. Every step leaves a file in OUT;
the same command goes on where it stopped, within a training too. ``--train`` takes several, such as
``kv,qkv,both-kv``: ``both-`` trains decode's blocks along.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from pdtrim.bundle import TrimPlan
from pdtrim.calibration.batches import CalibrationConfig, load_calibration, text_batch
from pdtrim.calibration.mixture import load_mixture
from pdtrim.distill.job import DistillConfig
from pdtrim.distill.train import distill
from pdtrim.evaluate.configs import TasksConfig
from pdtrim.evaluate.quality import measure_quality
from pdtrim.evaluate.statistics import paired_difference
from pdtrim.evaluate.tasks.run import run_task
from pdtrim.models.loading import load_model
from pdtrim.models.model import Model
from pdtrim.plan import Gates
from pdtrim.repair.apply import best_repair
from pdtrim.repair.held_out import HeldOut
from pdtrim.stage.forward import Pair, Trimmed
from pdtrim.verbs.distill import TrainConfig, distill_plan, pays_to_keep
from pdtrim.verbs.plan import PlanConfig, make_plan
from pdtrim.versions import host, versions
from pdtrim.words import RECALL

PROBE_STEPS = 3


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder, a GGUF file or a name")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--remove", required=True, help="layers, or a number to search for")
    parser.add_argument("--train", default="kv", help="of kv, norms, qkv, blocks, both-kv, ...")
    parser.add_argument("--minutes", type=float, default=5, help="of each training")
    parser.add_argument("--sequences", type=int, default=512, help="to train on, without recall")
    parser.add_argument("--recall", type=float, default=1.0)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--continuation-tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--limit", type=int, default=500, help="LAMBADA passages")
    parser.add_argument("--text-limit", type=int, default=32, help="held-out sequences")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    return parser.parse_args()


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What a file of an earlier run holds, or what is made now."""
    if not path.is_file():
        began = time.monotonic()
        made = make()
        part = path.with_suffix(".part")
        part.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        part.rename(path)
        print(f"{path.name}: {time.monotonic() - began:.0f} s", flush=True)
    return json.loads(path.read_text(encoding="utf-8"))


def bare_plan(args: argparse.Namespace, model: Model) -> None:
    """The plan without repairs, and with the best."""
    repaired, bare = args.out / "repaired.json", args.out / "bare.json"
    if repaired.is_file():
        return
    source = str(args.data / "c4" / "train.jsonl")
    if "," not in args.remove:
        config = PlanConfig(prefill_remove=float(args.remove), calibration=source, seed=args.seed)
        plan = make_plan(model, config, repaired, say=print).plan
        TrimPlan.of(plan, {}).save(bare)
        return
    layers = [int(layer) for layer in args.remove.split(",")]
    gates = Gates.removing(model.num_layers, prefill=layers).without_dead_work()
    text = load_calibration(model, CalibrationConfig(source=source, seed=args.seed))
    plan = TrimPlan.dense(model).plan.model_copy(update={"gates": gates})
    TrimPlan.of(plan, {}).save(bare)
    judge = HeldOut(model, text.rerank, weight=RECALL, seed=args.seed)
    found = best_repair(model, Trimmed.of(plan, Pair.dense(model)), text.fit, judge)
    print(f"repair: {found.text}, KL {found.kl:.4f}", flush=True)
    origin = plan.provenance.model_copy(update={"repair": found.text})
    TrimPlan.of(plan.model_copy(update={"provenance": origin}), found.blocks).save(repaired)


def config_of(args: argparse.Namespace, what: str, steps: int) -> TrainConfig:
    """A training, ``what`` being a word of ``--train``."""
    return TrainConfig(
        text=(str(args.data / "c4" / "train.jsonl"),),
        stage="both" if what.startswith("both-") else "prefill",
        train=what.removeprefix("both-"),
        recall=args.recall,
        prompt_tokens=args.prompt_tokens,
        continuation_tokens=args.continuation_tokens,
        sequences=args.sequences,
        steps=steps,
        rows=args.rows,
        accumulate=args.accumulate,
        learning_rate=args.learning_rate,
        seed=args.seed,
    )


def steps_in(args: argparse.Namespace, model: Model, what: str) -> int:
    """Steps that fit in the minutes: the schedule must know them before it begins."""
    config = config_of(args, what, 10**6)
    lengths = CalibrationConfig(
        source=config.text[0],
        prompt_tokens=args.prompt_tokens,
        continuation_tokens=args.continuation_tokens,
        search=args.rows * args.accumulate,
        rerank=1,
    )
    data, rest = load_mixture(model, config.text, lengths)
    probe = DistillConfig(
        stage=config.stage,
        parts=config.train,
        fit_rows=0,
        steps=PROBE_STEPS,
        rows=args.rows,
        accumulate=args.accumulate,
        keep_dense=pays_to_keep(model, data, config),
        compute=args.dtype,
    )
    trim = TrimPlan.open(args.out / "repaired.json")
    pair = trim.pair(model)
    trimmed = Trimmed.of(trim.plan, Pair(prefill=pair.prefill, decode=model))
    history = distill(model, trimmed, data, rest, probe).history
    seconds = (history[-1].seconds - history[0].seconds) / PROBE_STEPS
    return max(1, int(60 * args.minutes / seconds))


def measured(args: argparse.Namespace, model: Model, trimmed: Trimmed) -> dict[str, Any]:
    """LAMBADA and KL, item by item."""
    config = TasksConfig(data=str(args.data), limit=args.limit)
    scores = run_task(trimmed, "lambada_openai", config)
    batch = text_batch(
        model,
        str(args.data / "c4" / "valid.jsonl"),
        prompt_tokens=256,
        continuation_tokens=128,
        limit=args.text_limit,
    )
    quality = measure_quality(model, {"x": trimmed}, batch)["x"]
    return {
        "lambada": list(scores.items["acc"]),
        "nll": list(scores.items["perplexity"]),
        "kl": quality.kl_n.tolist(),
    }


def main() -> None:
    """Plan, train and measure what is not there yet; print and write the table."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {k: str(v) for k, v in vars(args).items() if k not in ("out", "data", "train")}
    if kept(args.out / "settings.json", lambda: settings) != settings:
        sys.exit(
            f"{args.out} was made with other settings: see settings.json, or give another --out"
        )
    model = load_model(args.model, dtype=args.dtype, device=args.device)
    bare_plan(args, model)
    rows = ["dense", "bare", "repaired"]
    for what in args.train.split(","):
        name = f"trained-{what}"
        target = args.out / f"{name}.json"
        steps = kept(args.out / f"{name}.steps", lambda what=what: steps_in(args, model, what))
        if not target.is_file():
            began = time.monotonic()
            config = config_of(args, what, steps)
            distill_plan(
                args.out / "repaired.json",
                config,
                target,
                model=args.model,
                dtype=args.dtype,
                device=args.device,
                say=lambda text: print(text, flush=True),
            )
            print(f"{name}: {steps} steps, {time.monotonic() - began:.0f} s", flush=True)
        rows.append(name)
    cells = {}
    for name in rows:

        def make(name: str = name) -> dict[str, Any]:
            if name == "dense":
                return measured(args, model, Trimmed.dense(model))
            trim = TrimPlan.open(args.out / f"{name}.json")
            return measured(args, model, Trimmed.of(trim.plan, trim.pair(model)))

        cells[name] = kept(args.out / f"{name}.cell", make)
    report(args.out, settings, cells)


def report(out: Path, settings: dict[str, str], cells: dict[str, Any]) -> None:
    """The table, also as ``table.md``; ``result.json`` holds every item."""
    count = len(cells["dense"]["lambada"])
    lines = [
        f"| | LAMBADA, {count} passages | to repaired [95 %] | of dense | its NLL | KL on C4 |",
        "|---|---|---|---|---|---|",
    ]
    dense = max(1, sum(cells["dense"]["lambada"]))
    for name, cell in cells.items():
        gain = paired_difference(cell["lambada"], cells["repaired"]["lambada"], seed=0)
        right = sum(cell["lambada"])
        lines.append(
            f"| {name} | {100 * right / count:.1f} |"
            f" {100 * gain.mean:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}] |"
            f" {100 * right / dense:.0f} % | {mean(cell['nll']):.3f} | {mean(cell['kl']):.4f} |"
        )
    print("\n".join(lines))
    (out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    made = {"settings": settings, "versions": versions(), "host": host(), "cells": cells}
    (out / "result.json").write_text(json.dumps(made) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
