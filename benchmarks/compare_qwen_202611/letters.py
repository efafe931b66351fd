"""What prefill without some blocks loses, as it is cut and with its keys and values fitted.

    python letters.py --model MODEL --data DATA --out OUT.json --remove 19-27 --remove 11,12,15

DATA holds c4/train.jsonl, which is fitted to and cut into rows of recall, c4/valid.jsonl, whose KL
is measured, and, for ``--items``, mmlu/test.jsonl. A line of JSON a set, as soon as it is known.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pdtrim.calibration.batches import CalibrationConfig, load_calibration, text_batch
from pdtrim.calibration.choices import QUESTION
from pdtrim.calibration.recall import answer_loss, recall_text
from pdtrim.distill.student import by_layer
from pdtrim.distill.warm import fitted_kv
from pdtrim.evaluate.configs import TasksConfig
from pdtrim.evaluate.quality import measure_quality
from pdtrim.evaluate.tasks.run import run_task
from pdtrim.models.loading import load_model
from pdtrim.models.model import Model
from pdtrim.models.swap import swap_blocks
from pdtrim.plan import Gates
from pdtrim.stage.forward import Batch, Pair, Trimmed

ASKED = QUESTION.split("\n")[1]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder, a GGUF file or a hub id")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--remove", action="append", required=True, help="such as 11,12,19-27")
    parser.add_argument("--fit", type=int, default=24, help="sequences that K and V are fitted to")
    parser.add_argument("--text", type=int, default=8, help="held-out sequences")
    parser.add_argument("--items", type=int, default=0, help="of MMLU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    return parser.parse_args()


def layers(text: str) -> set[int]:
    """Layers of a list such as ``11,12,19-27``."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


class Bench:
    """The texts, with what the dense model says of them."""

    def __init__(self, args: argparse.Namespace, model: Model) -> None:
        self.args, self.model = args, model
        source = CalibrationConfig(
            source=str(args.data / "c4" / "train.jsonl"),
            prompt_tokens=192,
            continuation_tokens=64,
            search=16,
            rerank=1,
            fit=args.fit,
        )
        text = load_calibration(model, source)
        self.fit = text.fit
        valid = str(args.data / "c4" / "valid.jsonl")
        lengths = {"prompt_tokens": 256, "continuation_tokens": 128}
        self.held_out = text_batch(model, valid, limit=args.text, **lengths)
        self.rows = recall_text(model, text.search)
        prompts = model.need_tokenizer().batch_decode(self.rows.batch.prompt_BP)
        self.choices_B = torch.tensor([ASKED in prompt for prompt in prompts])
        self.dense_B = self.answers(Trimmed.dense(model))

    def answers(self, trimmed: Trimmed) -> Tensor:
        """NLL of the answers of each row of recall, ``[B]``."""
        nll = []
        with torch.inference_mode():
            for first in range(0, len(self.rows), 4):
                some = self.rows[first : first + 4]
                nll.append(answer_loss(self.model, some, trimmed.last_stream(some.batch)))
        return torch.cat(nll).cpu()

    def measure(self, trimmed: Trimmed) -> dict[str, Any]:
        """KL, what answers lost by kind, and MMLU if it is asked for."""
        lost_B = (self.answers(trimmed) - self.dense_B).clamp_min(0)
        kl = measure_quality(self.model, {"x": trimmed}, self.held_out)["x"].kl
        found: dict[str, Any] = {
            "kl": round(kl, 4),
            "other_recall": round(float(lost_B[~self.choices_B].mean()), 3),
        }
        if self.choices_B.any():  # a model that knows letters
            found["choices"] = round(float(lost_B[self.choices_B].mean()), 3)
        if self.args.items:
            config = TasksConfig(data=str(self.args.data), limit=self.args.items)
            right = run_task(trimmed, "mmlu", config).items["acc"]
            found["mmlu"] = f"{int(sum(right))} of {len(right)}"
        return found


def fitted(model: Model, gates: Gates, text: Batch, gone: set[int]) -> Trimmed:
    """Prefill with keys and values of its skipped blocks fitted to the dense model's."""
    made = fitted_kv(model, Trimmed.whole(Pair.dense(model), gates), text, gone)
    prefill = swap_blocks(model, by_layer(made))
    return Trimmed.whole(Pair(prefill=prefill, decode=model), gates)


def main() -> None:
    """Measure each set; what is in the file already stays."""
    args = arguments()
    model = load_model(args.model, dtype=args.dtype, device=args.device)
    bench = Bench(args, model)
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    todo = [("dense", lambda: Trimmed.dense(model))] if args.items else []
    for text in args.remove:
        gone = layers(text)
        gates = Gates.removing(model.num_layers, prefill=gone)
        todo += [
            (text, lambda gates=gates: Trimmed.whole(Pair.dense(model), gates)),
            (f"{text} fitted", lambda g=gates, gone=gone: fitted(model, g, bench.fit, gone)),
        ]
    for name, make in todo:
        if name not in known:
            known[name] = bench.measure(make())
            args.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(known[name]), flush=True)


if __name__ == "__main__":
    main()
