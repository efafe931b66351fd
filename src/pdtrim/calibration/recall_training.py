"""Training text whose continuations need the prompt, made of ordinary text without a template.

A prefill that skips blocks keeps most of web text's next words, which the last few tokens decide,
and loses what stands once, far back. Three kinds of rows ask for that: *copies* go on with long
pieces of their prompt (``recall.py``); *pairs* are short pieces, listed in the prompt and again in
another order, so that the begin of a piece is a key and its rest the value; *returns* are the text
itself, cut before a rare token that stands in the prompt, but not in its last few tokens.

Shapes: n rows, W = P + C tokens, P prompt, C continuation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdtrim.calibration.recall import with_recall
from pdtrim.errors import CalibrationError
from pdtrim.stage.forward import Batch

PAIR = 8
"""Tokens of a key and its value."""
NEAR = 16
"""A token seen so short a time ago returns without recall."""
RARE = 5e-4
"""Largest share of the text that a returning token has."""


def recall_rows(text: Batch, count: int, *, begin: int = 0, seed: int = 0) -> Batch:
    """Rows that need recall, a third of each kind; copies stand in for returns that there are not.

    Args:
        text: rows that follow one another, as ``pack`` cuts them.
        begin: special tokens that each row begins with.

    Raises:
        CalibrationError: a share of prompts too short to hold two pieces.
    """
    P = text.prompt_BP.shape[1]
    least = begin + 2 * PAIR
    if least > P:
        raise CalibrationError(
            f"text that needs recall takes prompts of {least} tokens at least, not {P}"
        )
    draw = torch.Generator().manual_seed(seed)
    returned = returns(text, count // 3, begin=begin, draw=draw)
    listed = pairs(text, count // 3, begin=begin, draw=draw)
    left = count - len(returned) - len(listed)
    chosen = torch.randint(0, len(text), (left,), generator=draw)
    copied = with_recall(text[chosen], seed=seed)[left:]
    return Batch.cut(torch.cat((returned, listed, copied.ids_BT)), P)


def returns(text: Batch, count: int, *, begin: int, draw: torch.Generator) -> Tensor:
    """At most ``count`` windows ``[n, W]`` whose continuation begins with a token that returns."""
    P, C = text.prompt_BP.shape[1], text.continuation_BC.shape[1]
    prefix, stream = _stream(text, begin)
    limit = RARE * len(stream)
    seen_V = torch.bincount(stream)
    last: dict[int, int] = {}
    places = []
    for at, token in enumerate(stream.tolist()):
        back = at - last.get(token, -len(stream))
        last[token] = at
        inside = P - begin <= at <= len(stream) - C
        if inside and NEAR < back <= P - begin and int(seen_V[token]) <= max(limit, 2):
            places.append(at)
    order = torch.randperm(len(places), generator=draw)[:count].tolist()
    rows = [
        torch.cat((prefix, stream[places[i] - P + begin : places[i] + C])) for i in sorted(order)
    ]
    return torch.stack(rows) if rows else stream.new_empty(0, P + C)


def pairs(text: Batch, count: int, *, begin: int, draw: torch.Generator) -> Tensor:
    """Lists of short pieces of the text, and then again in another order, ``[n, W]``."""
    P, C = text.prompt_BP.shape[1], text.continuation_BC.shape[1]
    prefix, stream = _stream(text, begin)
    many = (P - begin) // PAIR
    rest = P - begin - many * PAIR
    rows = [stream.new_empty(0, P + C)]
    for _ in range(count):
        starts = torch.randint(0, len(stream) - PAIR - rest + 1, (many,), generator=draw).tolist()
        pieces = torch.stack([stream[start : start + PAIR] for start in starts])
        orders = [torch.randperm(many, generator=draw) for _ in range(-(-C // (many * PAIR)))]
        again = torch.cat([pieces[order].flatten() for order in orders])[:C]
        lead = stream[starts[0] : starts[0] + rest]
        rows.append(torch.cat((prefix, lead, pieces.flatten(), again))[None])
    return torch.cat(rows)


def _stream(text: Batch, begin: int) -> tuple[Tensor, Tensor]:
    return text.ids_BT[0, :begin], text.ids_BT[:, begin:].flatten()
