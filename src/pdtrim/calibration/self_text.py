"""Calibration text that the dense model writes itself, for users without a data set.

Each sequence starts from a random word-like token and is sampled at temperature 1 (nucleus 0.95).
Where the model ends a text, the sequence goes on with a new random token, as packed documents do.
The idea is that of LLM-QAT (2305.17888): data a model generates follow its own distribution, which
is what its pruned copy should keep. Different: no top-k stage, and no prompt template.

Shapes: n sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from pdtrim.calibration.tokens import begin_ids, check_length
from pdtrim.kv.groups import HeadGroup
from pdtrim.models.model import Model
from pdtrim.plan import Gates
from pdtrim.progress import Advance, Progress, silent
from pdtrim.stage.cache import LayerCache
from pdtrim.stage.generate import generate
from pdtrim.stage.sampler import Sampler
from pdtrim.stage.sampling import Sampling

GROUP = {"cpu": 32, "cuda": 2048}  # sequences written side by side


def write_own_text(
    model: Model, *, sequences: int, tokens: int, seed: int, progress: Progress = silent
) -> Tensor:
    """Token ids ``[sequences, tokens]``, the same for the same model, dtype, device and seed."""
    check_length(tokens, model.config, "sequences")
    starts = _word_tokens(model)
    groups = []
    side_by_side = GROUP.get(model.device.type, GROUP["cpu"])
    with progress("writing calibration text", tokens * -(-sequences // side_by_side)) as advance:
        for first in range(0, sequences, side_by_side):
            rows = min(side_by_side, sequences - first)
            groups.append(_write(model, rows, tokens, seed + first, starts, advance))
    return torch.cat(groups)


def _write(
    model: Model, rows: int, tokens: int, seed: int, starts: list[int], advance: Advance
) -> Tensor:
    rng = random.Random(seed)
    draw = Sampler(Sampling(temperature=1.0, top_p=0.95, seed=seed), rows)
    ends = torch.tensor(model.end_ids or [-1])

    def sampler(logits_BV: Tensor) -> Tensor:
        fresh = torch.tensor([rng.choice(starts) for _ in range(rows)])
        after_end = torch.isin(ids[-1], ends)
        return torch.where(after_end, fresh, draw(logits_BV).cpu()).to(model.device)

    prefix = [] if model.tokenizer is None else begin_ids(model.tokenizer)
    ids = [torch.full((rows,), token) for token in prefix]
    ids.append(torch.tensor([rng.choice(starts) for _ in range(rows)]))
    caches = _empty_caches(model, rows, tokens)
    gates = Gates.dense(model.num_layers)
    at = torch.zeros(rows, dtype=torch.long, device=model.device)
    if prefix:  # put the begin token into the cache
        ahead = generate(model, gates, caches, ids[0].to(model.device), at, draw, max_new_tokens=1)
        next(ahead)
        at = at + 1
    steps = generate(
        model,
        gates,
        caches,
        ids[-1].to(model.device),
        at,
        sampler,
        max_new_tokens=tokens - len(ids),
    )
    for ids_B in steps:
        ids.append(ids_B.cpu())
        advance(1)
    return torch.stack(ids, dim=1)


def _empty_caches(model: Model, rows: int, tokens: int) -> dict[int, LayerCache]:
    empty = torch.empty(
        rows, model.num_kv_heads, 0, model.head_dim, dtype=model.dtype, device=model.device
    )
    heads = tuple(range(model.num_kv_heads))
    nowhere = torch.empty(rows, len(heads), 0, dtype=torch.long, device=model.device)
    nothing = HeadGroup(heads=heads, k_BgMD=empty, v_BgMD=empty, positions_BgM=nowhere)
    return {
        layer: LayerCache([nothing], capacity=tokens, window=model.block(layer).window)
        for layer in range(model.num_layers)
    }


def _word_tokens(model: Model) -> list[int]:
    """Tokens that begin a capitalised word; every token for a model without a tokenizer."""
    if model.tokenizer is None:
        return list(range(model.config.vocab_size))
    words = []
    for token in range(min(len(model.tokenizer), model.config.vocab_size)):
        text = str(model.tokenizer.decode([token]))
        word = text.removeprefix(" ")
        if word.isascii() and word.isalpha() and word[0].isupper() and word[1:].islower():
            words.append(token)
    return words or list(range(model.config.vocab_size))
