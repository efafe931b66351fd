"""What decode retrieves from prompts of 1,024 tokens, probe by probe: a file a plan.

python retrieval.py --model FOLDER --out OUT dense NAME=PLAN.json ...
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pdtrim.bundle import TrimPlan
from pdtrim.evaluate.kv_suite import KvSuiteConfig, run_suite
from pdtrim.models.loading import load_model
from pdtrim.stage.forward import Trimmed


def main() -> None:
    """Measure what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--probes", type=int, default=100, help="of each task")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("of", nargs="+", help="dense, or NAME=PLAN.json")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = load_model(args.model, device=args.device)
    config = KvSuiteConfig(probes=args.probes, tokens=args.tokens)
    for one in args.of:
        name, _, plan = one.partition("=")
        path = args.out / f"{name}.json"
        if path.is_file():
            continue
        trimmed = Trimmed.dense(model)
        if plan:
            trim = TrimPlan.open(plan)
            trimmed = Trimmed.of(trim.plan, trim.pair(model))
        suite = run_suite(trimmed, {}, config)
        hits = {key: found.tolist() for key, found in suite.hits["full"].items()}
        made = {"tokens": args.tokens, "metrics": suite["full"], "hits": hits}
        part = path.with_suffix(".part")
        part.write_text(json.dumps(made) + "\n", encoding="utf-8")
        part.rename(path)
        print(name, {key: round(value, 3) for key, value in suite["full"].items()}, flush=True)


if __name__ == "__main__":
    main()
