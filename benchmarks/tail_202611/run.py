"""What a full-depth tail gives back: the last r prompt tokens run every block, the rest prefill's.

    python run.py --model smollm2 --data DATA --out OUT

Decode runs every block here, so a tail of r tokens is the pair whose decode begins r tokens before
the prompt's end, and no other code is needed to measure it. Prefill's keys and values of a token do
not depend on later tokens: one prefill of the whole prompt serves every r. r = 1 is pdtrim's own
rule, and POP's (2602.03295): the last token belongs to decode. With r = 0 prefill makes the first
new token, which is what that rule avoids.

DATA is a folder of text: repairs are fitted on DATA/c4/train.jsonl, and KL is measured on
DATA/c4/valid.jsonl and DATA/wikitext2/valid.jsonl. Each item leaves a line in OUT/items.jsonl; the
same command goes on where it stopped, and ``--report`` makes the table of what is there.

Shapes: B batch, 1 here; P prompt tokens, C continuation tokens, T both, E hidden width.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pdtrim.bundle import TrimPlan
from pdtrim.calibration.batches import CalibrationConfig, load_calibration, text_batch
from pdtrim.calibration.tokens import begin_ids, encode_for
from pdtrim.evaluate.retrieval import generate
from pdtrim.evaluate.statistics import paired_difference
from pdtrim.kv.groups import HeadGroup
from pdtrim.kv.policy import whole
from pdtrim.models.loading import load_model
from pdtrim.models.model import Model
from pdtrim.plan import Gates
from pdtrim.repair.apply import Kind, repair
from pdtrim.stage.forward import Batch, Pair, Trimmed, decode_stream
from pdtrim.stage.step import prefill_block
from pdtrim.versions import host, versions

SETS: dict[str, tuple[tuple[int, ...], Kind]] = {
    "kl": ((14, 18, 20, 22, 23, 25, 26, 27, 28, 29), "outputs+kv"),
    "recall": ((17, 18, 20, 21, 24, 25, 26, 27, 28, 29), "linear+kv"),
    "last-half": (tuple(range(15, 30)), "kv"),
}
"""Blocks that prefill skips, and the repair that has the least KL (../train_prefill)."""
TEXTS = ("c4", "wikitext2")
TASKS = ("needle", "multikey")


@dataclass(frozen=True, kw_only=True, eq=False)
class Item:
    """A prompt and its continuation ``[1, T]``, all of which is scored."""

    kind: str
    number: int
    ids_BT: Tensor
    prompt: int

    @property
    def name(self) -> str:
        """In the journal."""
        return f"{self.kind} {self.number}"

    @property
    def target_BC(self) -> Tensor:
        """What is to be predicted."""
        return self.ids_BT[:, self.prompt :]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--continuation-tokens", type=int, default=64)
    parser.add_argument("--tails", default="0,1,16,64,128,256,1024")
    parser.add_argument("--long-every", type=int, default=4, help="item has r above n/16 too")
    parser.add_argument("--probes", type=int, default=50, help="of each task")
    parser.add_argument("--text-limit", type=int, default=16, help="sequences of each text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", action="store_true", help="of what is measured by now")
    return parser.parse_args()


def repaired(args: argparse.Namespace, model: Model, name: str) -> Trimmed:
    """A pair whose prefill skips a set of blocks, with the repair that ``pdtrim plan`` chooses."""
    path = args.out.parent / "plans" / f"{name}.json"
    layers, kind = SETS[name]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        gates = Gates.removing(model.num_layers, prefill=layers).without_dead_work()
        source = CalibrationConfig(source=str(args.data / "c4" / "train.jsonl"), seed=args.seed)
        text = load_calibration(model, source)
        plan = TrimPlan.dense(model).plan.model_copy(update={"gates": gates})
        bare = Trimmed.of(plan, Pair.dense(model))
        TrimPlan.of(plan, repair(model, bare, text.fit, kind, stages=("prefill",))).save(path)
        print(f"{name}: repaired", flush=True)
    trim = TrimPlan.open(path)
    return Trimmed.of(trim.plan, trim.pair(model))


def items(args: argparse.Namespace, model: Model) -> Iterator[Item]:
    """Texts and probes in turn, so that a part of them is a fair part."""
    P, C = args.prompt_tokens, args.continuation_tokens
    texts = {
        kind: text_batch(
            model,
            str(args.data / kind / "valid.jsonl"),
            prompt_tokens=P,
            continuation_tokens=C,
            limit=args.text_limit,
        ).ids_BT
        for kind in TEXTS
        if args.text_limit
    }
    begin = begin_ids(model.need_tokenizer())
    probes = {
        task: generate(
            task,
            count=args.probes,
            seed=args.seed,
            count_tokens=lambda text: len(begin) + len(encode_for(model, text)),
            tokens=P,
        )
        for task in TASKS
        if args.probes
    }
    numbers = list(range(max(args.probes, args.text_limit)))
    random.Random(args.seed).shuffle(numbers)  # a probe's depth grows with its number
    for number in numbers:
        for kind, ids_nT in texts.items():
            if number < len(ids_nT):
                yield Item(kind=kind, number=number, ids_BT=ids_nT[number : number + 1], prompt=P)
        for task, of_task in probes.items():
            if number < len(of_task):
                probe = of_task[number]
                prompt = begin + encode_for(model, probe.context)
                prompt += encode_for(model, probe.question)
                ids = [*prompt, *encode_for(model, probe.answer)]
                ids_BT = torch.tensor([ids])
                yield Item(kind=task, number=number, ids_BT=ids_BT, prompt=len(prompt))


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefill:
    """What prefill made of some tokens: the streams that enter layers, and keys and values."""

    entry_BTE: dict[int, Tensor]
    handed: list[HeadGroup]


def prefilled(trimmed: Trimmed, ids_BT: Tensor, keep: set[int], begun: Prefill | None) -> Prefill:
    """Run prefill on tokens from their first on.

    Args:
        keep: layers whose entering stream is wanted; that of the head is kept always.
        begun: a run on at least these tokens that is the same before the only layer it keeps.
    """
    model, gates, T = trimmed.pair.prefill, trimmed.gates, ids_BT.shape[1]
    rope = model.rope(torch.arange(T)[None])
    start, x_BTE, handed, entry = 0, model.embed(ids_BT), [], {}
    if begun is not None:
        start, x_BTE = next((layer, x[:, :T]) for layer, x in begun.entry_BTE.items())
        handed = [first(group, T) for group in begun.handed[:start]]
    for layer in range(start, model.num_layers):
        if layer in keep:
            entry[layer] = x_BTE
        x_BTE, view = prefill_block(
            model.blocks[layer],
            x_BTE,
            rope,
            model.rope,
            attention=gates.prefill_attention[layer],
            mlp=gates.prefill_mlp[layer],
        )
        assert view is not None  # decode is whole
        handed.append(whole(view))
    return Prefill(entry_BTE={**entry, model.num_layers: x_BTE}, handed=handed)


def first(group: HeadGroup, tokens: int) -> HeadGroup:
    """The pairs of the first tokens."""
    return HeadGroup(
        heads=group.heads,
        k_BgMD=group.k_BgMD[:, :, :tokens],
        v_BgMD=group.v_BgMD[:, :, :tokens],
        positions_BgM=group.positions_BgM[:, :, :tokens],
    )


def first_difference(model: Model, trimmed: Trimmed) -> int:
    """The first layer that prefill runs otherwise than the dense model does."""
    gates, own = trimmed.gates, trimmed.pair.prefill
    for layer in range(model.num_layers):
        runs = gates.prefill_attention[layer] == "full" and gates.prefill_mlp[layer]
        if not runs or own.block(layer).module is not model.block(layer).module:
            return layer
    return model.num_layers


def last_stream(
    model: Model, item: Item, dense: Prefill, prefill: Prefill, start: int, tail: int
) -> Tensor:
    """What the head reads of the continuation ``[B, C, E]``, behind a tail of so many tokens.

    Args:
        start: the layer before which prefill is the dense model.
    """
    N, C = item.prompt - tail, item.target_BC.shape[1]
    batch = Batch.cut(item.ids_BT, N + 1)
    groups = [[first(group, N)] for group in prefill.handed]
    y_BSE = dense.entry_BTE[start][:, N:]
    y_BSE = decode_stream(model, batch, groups, y_BSE, start=start)
    x_BPE = prefill.entry_BTE[model.num_layers]
    return y_BSE[:, -C:] if tail else torch.cat((x_BPE[:, -1:], y_BSE), 1)


def score(model: Model, item: Item, y_BCE: Tensor, dense_logp_CV: Tensor) -> dict[str, float]:
    """Of a text the KL to the dense model, of a probe whether it is answered; NLL of both."""
    logp_CV = F.log_softmax(model.head(y_BCE)[0], -1, dtype=torch.float32)
    target_C = item.target_BC[0]
    nll = -logp_CV.gather(-1, target_C[:, None]).mean()
    kl = (dense_logp_CV.exp() * (dense_logp_CV - logp_CV)).sum(-1).mean()
    hit = (logp_CV.argmax(-1) == target_C).all()
    return {"kl": float(kl), "nll": float(nll), "hit": float(hit)}


@torch.inference_mode()
def measure(model: Model, pairs: dict[str, Trimmed], item: Item, tails: list[int]) -> Any:
    """One item under every set of blocks and every tail."""
    ids_BT, P = item.ids_BT[:, :-1], item.prompt
    starts = {name: first_difference(model, trimmed) for name, trimmed in pairs.items()}
    last = model.num_layers - 1  # of which prefill runs no more than decode reads
    dense = prefilled(Trimmed.dense(model), ids_BT, {*starts.values(), last}, None)
    y_BCE = last_stream(model, item, dense, dense, last, 1)
    logp_CV = F.log_softmax(model.head(y_BCE)[0], -1, dtype=torch.float32)
    found: dict[str, Any] = {"dense": score(model, item, y_BCE, logp_CV)}
    for name, trimmed in pairs.items():
        start = starts[name]
        begun = Prefill(entry_BTE={start: dense.entry_BTE[start]}, handed=dense.handed)
        prefill = prefilled(trimmed, ids_BT[:, :P], set(), begun)
        found[name] = {
            str(r): score(model, item, last_stream(model, item, dense, prefill, start, r), logp_CV)
            for r in tails
        }
    return found


def journal(path: Path) -> dict[str, Any]:
    """Items that are measured."""
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["item"]: row["found"] for row in rows}


def report(args: argparse.Namespace, done: dict[str, Any]) -> None:
    """The tables, and ``result.json`` with every item."""
    lines = []
    for kinds, metric, goal in ((TEXTS, "kl", 1 / 2), (TASKS, "hit", 1 / 3)):
        rows = [found for name, found in done.items() if name.split()[0] in kinds]
        if len(rows) > 1:
            lines += table(" and ".join(kinds), rows, metric, goal, args)
    print("\n".join(lines))
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "data", "report")}
    made = {"settings": settings, "versions": versions(), "host": host(), "items": done}
    (args.out / "result.json").write_text(json.dumps(made) + "\n", encoding="utf-8")


def table(
    what: str, rows: list[Any], metric: str, goal: float, args: argparse.Namespace
) -> list[str]:
    """What each tail gives back of what r = 1 loses, and by how much it passes the goal's share."""
    dense = sum(row["dense"][metric] for row in rows) / len(rows)
    lines = [
        f"\n{what}, {len(rows)} items, dense {dense:.4g}\n",
        f"| blocks | r | items | {metric} | change to r = 1 [95 %] | given back"
        f" | beyond {goal:.0%} [95 %] | NLL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in args.sets.split(","):
        for tail in args.tails.split(","):
            some = [row for row in rows if tail in row[name]]
            if len(some) < 2:
                continue
            own, base = ([row[name][r][metric] for row in some] for r in (tail, "1"))
            lost = [row["dense"][metric] - b for row, b in zip(some, base, strict=True)]
            sign = 1 if sum(lost) >= 0 else -1
            change = paired_difference(own, base, seed=args.seed)
            gains = [sign * (o - b) for o, b in zip(own, base, strict=True)]
            asked = [sign * goal * part for part in lost]
            beyond = paired_difference(gains, asked, seed=args.seed)
            nll = sum(row[name][tail]["nll"] for row in some) / len(some)
            lines.append(
                f"| {name} | {tail} | {len(some)} | {sum(own) / len(own):.4f} |"
                f" {change.mean:+.4f} [{change.low:+.4f}, {change.high:+.4f}] |"
                f" {sum(gains) / abs(sum(lost)):.0%} |"
                f" {beyond.mean:+.4f} [{beyond.low:+.4f}, {beyond.high:+.4f}] | {nll:.3f} |"
            )
    return lines


def main() -> None:
    """Measure what is not there yet."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "items.jsonl"
    done = journal(path)
    if not args.report:
        model = load_model(args.model, dtype="float32")
        pairs = {name: repaired(args, model, name) for name in args.sets.split(",")}
        tails = [int(r) for r in args.tails.split(",")]
        short = [r for r in tails if r <= args.prompt_tokens // 16]
        for item in items(args, model):
            if item.name not in done:
                rare = item.number % args.long_every == 0
                done[item.name] = measure(model, pairs, item, tails if rare else short)
                line = json.dumps({"item": item.name, "found": done[item.name]})
                with path.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
    report(args, done)


if __name__ == "__main__":
    main()
