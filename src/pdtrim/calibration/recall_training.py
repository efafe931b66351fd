"""Training text whose continuations need the prompt, made of ordinary text.

A prefill that skips blocks keeps most of web text's next words, which the last few tokens decide,
and loses what stands once, far back. Three kinds of rows ask for that without a template: *copies*
go on with long pieces of their prompt (``recall.py``); *pairs* are short pieces, listed in the
prompt and again in another order, so that the begin of a piece is a key and its rest the value;
*returns* are the text itself, cut before a rare token that stands in the prompt, but not in its
last few tokens.

A model that answers by the letter of an option has a fourth kind: *choices* are a piece of the text
and questions which of four words it holds, one after the other, cut before the first letter
(``choices.py``). Some blocks bind letters to options, and rows of the other kinds do not miss them.

Shapes: n rows, W = P + C tokens, P prompt, C continuation.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from pdtrim.calibration.choices import TRIES, Asker
from pdtrim.calibration.recall import Recall, answer_loss, with_recall
from pdtrim.calibration.tokens import encode_for
from pdtrim.calibration.word_tokens import WordTokens
from pdtrim.errors import CalibrationError
from pdtrim.models.model import Model
from pdtrim.stage.forward import Batch, Trimmed

PAIR = 8
"""Tokens of a key and its value."""
NEAR = 16
"""A token seen so short a time ago returns without recall."""
RARE = 5e-4
"""Largest share of the text that a returning token has."""
SAMPLE = 8
"""Choices that tell whether a model answers by letters."""
KNOWN = 0.3
"""Likelihood of the right letters above which a model knows them. A guess has 0.25 at most on
average; Qwen2.5-Coder-0.5B has 0.24 to 0.26 and the 1.5B 0.37 to 0.55, by the prompts' length."""


def recall_rows(
    text: Batch, count: int, *, begin: int = 0, seed: int = 0, asked: Model | None = None
) -> Batch:
    """Rows that need recall, as many of each kind; copies stand in for rows that there are not.

    Args:
        text: rows that follow one another, as ``pack`` cuts them.
        begin: special tokens that each row begins with.
        asked: a model that answers by letters (:func:`letters_known`), for choices; None for none.

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
    share = count // (3 if asked is None else 4)
    made = [kind(text, share, begin=begin, draw=draw) for kind in (returns, pairs)]
    if asked is not None:
        made.append(choices(asked, text, share, begin=begin, seed=seed).batch.ids_BT)
    left = count - sum(map(len, made))
    chosen = torch.randint(0, len(text), (left,), generator=draw)
    copied = with_recall(text[chosen], seed=seed)[left:]
    return Batch.cut(torch.cat((*made, copied.ids_BT)), P)


@torch.inference_mode()
def letters_known(model: Model, text: Batch, *, begin: int = 0, seed: int = 0) -> float | None:
    """How likely a model finds the right letters of some choices made of a text.

    Returns:
        The geometric mean, so that a model that always likes one letter has little; None where no
        choice can be made.
    """
    sample = choices(model, text, SAMPLE, begin=begin, seed=seed)
    if not len(sample.batch):
        return None
    batch, answer_BC = sample.batch.to(model.device), sample.answer_BC.to(model.device)
    y_BCE = Trimmed.dense(model).last_stream(batch)
    loss_B = answer_loss(model, replace(sample, batch=batch, answer_BC=answer_BC), y_BCE)
    return float(loss_B.mean().neg().exp())


def choices(model: Model, text: Batch, count: int, *, begin: int = 0, seed: int = 0) -> Recall:
    """At most ``count`` pieces of the text with questions whose answers are letters.

    Args:
        model: its tokenizer words the questions.

    Returns:
        The rows, each with its letters as answers.
    """
    P, C = text.prompt_BP.shape[1], text.continuation_BC.shape[1]
    prefix, texts = text.ids_BT[0, :begin].tolist(), text.ids_BT[:, begin:].tolist()
    words = WordTokens(model.tokenizer)
    asker = Asker(
        words=words,
        ids=partial(encode_for, model),
        rare=words.rare(texts),
        texts=texts,
        size=P - begin,
        rng=random.Random(seed),
    )
    tries = (asker.turns(asker.rng.choice(texts), C) for _ in range(TRIES * count))
    made = list(islice(filter(None, tries), count))
    rows = [[*prefix, *turns.prompt, *turns.continuation] for turns in made]
    answers = [[at in turns.letters for at in range(C)] for turns in made]
    return Recall(
        batch=Batch.cut(torch.tensor(rows, dtype=torch.long).view(-1, P + C), P),
        answer_BC=torch.tensor(answers, dtype=torch.bool).view(-1, C),
        rows=1,
    )


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
