"""Time of each stage of a pair, beside the dense model's in the same rounds.

Prefill runs a prompt but its last token, as the stage's process does. Decode generates greedily
from the cache that its prefill handed over; the handover itself is in neither time. Every round
times all four, so that a machine that slows down for a while slows both sides of a ratio; a stage's
result is the median over rounds of its round's ratio.

Shapes: B = 1 sequence, P prompt tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pdtrim.clock import timed
from pdtrim.errors import PdtrimError
from pdtrim.kv.groups import HeadGroup
from pdtrim.kv.policy import hand_over
from pdtrim.progress import Progress, silent
from pdtrim.stage.cache import LayerCache
from pdtrim.stage.forward import Trimmed
from pdtrim.stage.generate import generate, prefill, run_prefill


@dataclass(frozen=True, kw_only=True)
class StageRatios:
    """Time of each stage over the dense model's, and the median seconds that the dense one took."""

    prefill: float
    decode: float
    dense_prefill_s: float
    dense_decode_s: float


@torch.inference_mode()
def stage_times(
    variant: Trimmed,
    dense: Trimmed,
    *,
    prompt: int = 512,
    new_tokens: int = 32,
    repeats: int = 5,
    progress: Progress = silent,
) -> StageRatios:
    """Times of one sequence, in ``repeats`` interleaved rounds behind one that warms up.

    Args:
        dense: the unpruned model, with the same vocabulary and on the same device.
        prompt: tokens of the prompt; prefill runs all but the last.
        new_tokens: tokens that decode generates.

    Raises:
        PdtrimError: a number is out of range.
    """
    if prompt < 2 or min(new_tokens, repeats) < 1:
        raise PdtrimError("timing needs a prompt of 2 tokens or more, a new token and a repeat")
    model = dense.pair.decode
    drawn = torch.Generator().manual_seed(0)
    ids_BP = torch.randint(0, model.config.vocab_size, (1, prompt), generator=drawn)
    ids_BP = ids_BP.to(model.device)
    prepare: dict[str, Callable[[], Callable[[], None]]] = {}
    for name, side in (("dense", dense), ("variant", variant)):
        run = partial(run_prefill, side.pair.prefill, ids_BP[:, :-1], side.gates)
        prepare[f"{name} prefill"] = lambda run=run: run  # type: ignore[misc]
        groups = _groups(side, ids_BP)
        prepare[f"{name} decode"] = partial(_decode, side, ids_BP, groups, new_tokens)
    seconds: dict[str, list[float]] = {name: [] for name in prepare}
    with progress("timing the stages", (repeats + 1) * len(prepare)) as advance:
        for repeat in range(repeats + 1):  # the first round warms up
            for name, make in prepare.items():
                taken = timed(make(), model.device)
                if repeat:
                    seconds[name].append(taken)
                advance(1)

    def ratio(stage: str) -> float:
        pairs = zip(seconds[f"variant {stage}"], seconds[f"dense {stage}"], strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    return StageRatios(
        prefill=ratio("prefill"),
        decode=ratio("decode"),
        dense_prefill_s=statistics.median(seconds["dense prefill"]),
        dense_decode_s=statistics.median(seconds["dense decode"]),
    )


def _groups(side: Trimmed, ids_BP: Tensor) -> dict[int, list[HeadGroup]]:
    """What decode is handed over of the prompt, by layer."""
    views = prefill(side.pair.prefill, ids_BP[:, :-1], side.gates)
    return {layer: hand_over(side.policy, layer, view) for layer, view in views}


def _decode(
    side: Trimmed, ids_BP: Tensor, groups: dict[int, list[HeadGroup]], new_tokens: int
) -> Callable[[], None]:
    """A run of decode on a cache of its own, for decoding uses a cache up."""
    model = side.pair.decode
    caches = {
        layer: LayerCache(handed, capacity=new_tokens, window=model.block(layer).window)
        for layer, handed in groups.items()
    }
    last_B = ids_BP[:, -1]
    positions_B = torch.full_like(last_B, ids_BP.shape[1] - 1)

    def run() -> None:
        for _ in generate(
            model,
            side.gates,
            caches,
            last_B,
            positions_B,
            lambda logits_BV: logits_BV.argmax(-1),
            max_new_tokens=new_tokens,
        ):
            pass

    return run
