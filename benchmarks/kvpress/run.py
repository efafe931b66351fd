"""NVIDIA kvpress on held-out text: KL, NLL and bytes of each press, to set beside pdtrim's.

A peer, run in its own environment (README.md): nothing of pdtrim is imported. What is measured is
what `pdtrim eval` measures, on the same token ids: prefill takes the first P - 1 prompt tokens, its
cache is pruned, and decode runs the last prompt token and the true continuation on what is left,
at the original positions. KL is exact, against one forward of the unpressed model.

Shapes: n sequences, W = P + C tokens, P prompt, C continuation, V vocabulary.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import kvpress
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils.logging import disable_progress_bar

BF16_BYTES = 2
SECTION = 8  # rows; the packing of `pdtrim eval` ends a section of a document after so many

# each takes the fraction to remove; all decide in prefill, without weights of their own
PRESSES: dict[str, Callable[[float], kvpress.BasePress]] = {
    "snapkv": lambda r: kvpress.SnapKVPress(compression_ratio=r),
    "tova": lambda r: kvpress.TOVAPress(compression_ratio=r),
    "streaming_llm": lambda r: kvpress.StreamingLLMPress(compression_ratio=r),
    "expected_attention": lambda r: kvpress.ExpectedAttentionPress(compression_ratio=r),
    "knorm": lambda r: kvpress.KnormPress(compression_ratio=r),
    "keydiff": lambda r: kvpress.KeyDiffPress(compression_ratio=r),
    "random": lambda r: kvpress.RandomPress(compression_ratio=r),
    "pyramidkv": lambda r: kvpress.PyramidKVPress(compression_ratio=r),
    "criticalkv_snapkv": lambda r: kvpress.CriticalKVPress(
        kvpress.SnapKVPress(compression_ratio=r)
    ),
    "adakv_snapkv": lambda r: kvpress.AdaKVPress(kvpress.SnapKVPress(compression_ratio=r)),
    "adakv_expected_attention": lambda r: kvpress.AdaKVPress(
        kvpress.ExpectedAttentionPress(compression_ratio=r)
    ),
}


@dataclass(kw_only=True)
class Row:
    """One policy's measurements, one entry a sequence; nats a token."""

    press: str
    kl_n: list[float] = field(default_factory=list)
    nll_n: list[float] = field(default_factory=list)
    kept_n: list[float] = field(default_factory=list)  # pairs kept / pairs of the whole cache
    cache_bytes_n: list[int] = field(default_factory=list)  # the kept pairs in bf16
    simulated: bool = False  # pairs were masked in a cache of full length

    def record(self) -> dict:
        """The means first, then what they are means of."""
        means = {
            name: sum(values) / len(values)
            for name, values in (
                ("kl", self.kl_n),
                ("nll", self.nll_n),
                ("kept", self.kept_n),
                ("cache_bytes", self.cache_bytes_n),
            )
        }
        return {"press": self.press, **means, **asdict(self)}


def read_rows(tokenizer, path: Path, *, width: int, limit: int) -> Tensor:
    """The first ``limit`` rows ``[n, W]``, cut as `pdtrim eval` cuts them.

    Documents are tokenised without special tokens and joined with the end token, which also ends
    each section of a long document; a tokenizer that begins texts with BOS begins each row with it.
    """
    first = list(tokenizer("").input_ids[:1])
    prefix = first if first == [tokenizer.bos_token_id] else []
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    body = width - len(prefix)
    stream: list[int] = []
    with path.open(encoding="utf-8") as lines:
        for line in filter(str.strip, lines):
            ids = tokenizer(json.loads(line)["text"], add_special_tokens=False).input_ids
            for start in range(0, len(ids), SECTION * body):
                stream += [*ids[start : start + SECTION * body], *end]
            if len(stream) >= limit * body:
                break
    count = min(limit, len(stream) // body)
    if count < 1:
        sys.exit(f"{path} has {len(stream)} tokens, fewer than one sequence of {width}")
    return torch.tensor([prefix + stream[i * body : (i + 1) * body] for i in range(count)])


def pairs_kept(model, cache: DynamicCache) -> tuple[list[int], list[int]]:
    """For each layer, pairs that decode may see (over all KV heads), and pairs held."""
    seen, held = [], []
    for layer, block in zip(cache.layers, model.model.layers, strict=True):
        masked = getattr(block.self_attn, "masked_key_indices", None)
        held.append(layer.keys.shape[1] * layer.keys.shape[2])
        seen.append(held[-1] - (0 if masked is None else len(masked[0])))
    return seen, held


@torch.inference_mode()
def measure(model, press, ids_W: Tensor, *, prompt: int, target_logp_CV: Tensor, row: Row) -> None:
    """Prefill under ``press`` (or none), decode the rest teacher-forced, append to ``row``."""
    ids = ids_W[None].to(model.device)
    cache = DynamicCache(config=model.config)
    if press is None:
        model.model(ids[:, : prompt - 1], past_key_values=cache)
    else:
        with press(model):
            model.model(ids[:, : prompt - 1], past_key_values=cache)
    seen, held = pairs_kept(model, cache)
    heads, _, dim = cache.layers[0].keys.shape[1:]
    row.kept_n.append(sum(seen) / (heads * (prompt - 1) * len(seen)))
    row.cache_bytes_n.append(sum(seen) * 2 * dim * BF16_BYTES)
    row.simulated |= seen != held

    tail = ids[:, prompt - 1 : -1]
    # One causal mask serves all layers, so many tokens at once need layers of one length; and a
    # masking press looks for a key that hides from all queries of a call: it may find none for many
    at_once = tail.shape[1] if len(set(held)) == 1 and seen == held else 1
    logits = []
    for start in range(0, tail.shape[1], at_once):
        step = tail[:, start : start + at_once]
        positions = torch.arange(step.shape[1], device=model.device)[None] + prompt - 1 + start
        logits.append(model(step, past_key_values=cache, position_ids=positions).logits[0])
    logp_CV = F.log_softmax(torch.cat(logits).float(), dim=-1)
    kl_C = (target_logp_CV.exp() * (target_logp_CV - logp_CV)).sum(dim=-1)
    row.kl_n.append(float(kl_C.mean()))
    row.nll_n.append(float(F.nll_loss(logp_CV, ids[0, prompt:])))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a local folder")
    parser.add_argument("--text", required=True, type=Path, help="JSON lines with a field text")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--continuation-tokens", type=int, default=256)
    parser.add_argument("--limit", type=int, default=32, help="sequences")
    parser.add_argument(
        "--presses",
        default="snapkv,tova,streaming_llm,expected_attention",
        help="of " + ",".join(PRESSES),
    )
    parser.add_argument("--keep", type=float, default=0.2, help="fraction of the cache to keep")
    parser.add_argument(
        "--window", type=int, help="observation window of presses that have one (SnapKV's: 64)"
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("-o", "--output", required=True, type=Path)
    args = parser.parse_args()
    unknown = [name for name in args.presses.split(",") if name not in PRESSES]
    if unknown:
        parser.error(f"unknown presses {','.join(unknown)}: choose from {','.join(PRESSES)}")
    if not 0 < args.keep <= 1 or args.prompt_tokens < 2 or args.continuation_tokens < 1:
        parser.error("keep lies in 0..1; a prompt has 2 tokens or more, a continuation 1 or more")
    return args


def make_press(name: str, *, keep: float, window: int | None) -> kvpress.BasePress:
    """A press by name, with the observation window set where it has one."""
    press = PRESSES[name](1.0 - keep)
    scorer = getattr(press, "press", press)
    if window is not None and hasattr(scorer, "window_size"):
        scorer.window_size = window
    return press


def main() -> None:
    """Measure all presses on all sequences, write the result file, print a table."""
    args = arguments()
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    model = model.to(args.device).eval()
    prompt, width = args.prompt_tokens, args.prompt_tokens + args.continuation_tokens
    ids_nW = read_rows(tokenizer, args.text, width=width, limit=args.limit)

    torch.manual_seed(0)  # for the random press
    presses = {
        name: make_press(name, keep=args.keep, window=args.window)
        for name in args.presses.split(",")
    }
    rows = [Row(press=name) for name in ("none", *presses)]
    for ids_W in ids_nW:
        with torch.inference_mode():
            whole = ids_W[None, :-1].to(model.device)
            logits_CV = model(whole, logits_to_keep=args.continuation_tokens).logits[0]
            target_logp_CV = F.log_softmax(logits_CV.float(), dim=-1)
        for row in rows:
            press = presses.get(row.press)
            measure(model, press, ids_W, prompt=prompt, target_logp_CV=target_logp_CV, row=row)

    result = {
        "versions": {name: version(name) for name in ("kvpress", "transformers", "torch")},
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "sequences": len(ids_nW),
        "tokens_sha256": hashlib.sha256(ids_nW.numpy().tobytes()).hexdigest(),
        "rows": [row.record() for row in rows],
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{'press':<26}{'KL':>10}{'NLL':>9}{'kept':>8}{'bytes':>13}")
    for row in result["rows"]:
        note = "  (masked, not shortened)" if row["simulated"] else ""
        print(
            f"{row['press']:<26}{row['kl']:>10.5f}{row['nll']:>9.4f}{row['kept']:>8.3f}"
            f"{row['cache_bytes']:>13,.0f}{note}"
        )


if __name__ == "__main__":
    main()
