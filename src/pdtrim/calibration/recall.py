"""Text that only a cache which kept the prompt can predict: what *recall* means in this library.

Web text seldom looks back more than a few sentences, so what is fitted on it alone forgets what a
question could ask for. Recall is the loss of the answers in rows that need their prompt, cut out of
the text itself, without a data set:

* ``returns``: the text up to a word that stood in it before. Of some places in a sequence those are
  taken where the whole prompt tells the dense model most beyond what its last tokens do, as a
  LAMBADA passage does (Paperno et al., 1606.06031).
* ``pairs``: words of the text as keys and values, and then some keys again.
* ``copies``: a piece of the text, and its middle once more. (A repeated random sequence is the
  usual probe of induction heads: Olsson et al., 2209.11895.)
* ``questions``: what stood behind some words. Where there is no tokenizer, a copy.
* ``choices``: which of four words stood in the text; the answer is a letter (``choices.py``).

The search of blocks, the choice of repairs and ``sensitivity`` read :func:`recall_text`. A KV
budget has ``copies`` at the text's own length, in which every token is an answer
(:func:`with_recall`).

Shapes: n sequences of text, B rows of recall, P prompt tokens, C continuation tokens.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pdtrim.calibration.choices import SURE, Asker, Question
from pdtrim.calibration.tokens import begin_ids, encode_for
from pdtrim.calibration.word_tokens import WordTokens
from pdtrim.errors import CalibrationError
from pdtrim.models.model import Model
from pdtrim.stage.forward import Batch, Trimmed

PIECE = 32  # tokens; the first few only tell where it comes from
PROMPT, CONTINUATION = 64, 16  # tokens of a row, at most
LEAST = 16  # tokens of a sequence of text that rows are cut out of
PLACES = 2  # of a sequence, for each of its returns, which are chosen among them
SHORT = 12  # last tokens of a prompt, which tell what needs no recall
AWAY = 8  # tokens between a word and its return, at least
KEYS = 8
CUE = 4  # words of the text that a question names
QUESTION = '\nQuestion: What comes after "{}" in the text above?\nAnswer:'


@dataclass(frozen=True, kw_only=True)
class Rows:
    """How many rows are cut out of each sequence.

    Attributes:
        returns: words that return.
        others: of pairs, a copy and a question, in turn where not all three are asked for.
        choices: a choice is the last row of one in so many sequences, in place of another.
    """

    returns: int
    others: int
    choices: int

    @property
    def count(self) -> int:
        """All of a sequence."""
        return self.returns + self.others


FEW = Rows(returns=2, others=1, choices=2)
"""What a search asks of every state."""
ALL = Rows(returns=3, others=3, choices=1)
"""What the few repaired pairs are told apart by: every sequence is asked for every kind. Where each
is asked for one in turn, it matters much which is asked for which (``docs/log.md``)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Recall:
    """Rows that need their prompt, and which of their continuation tokens are answers.

    Those of one sequence of text lie together; a slice is of sequences.

    Attributes:
        rows: of one sequence.
    """

    batch: Batch
    answer_BC: Tensor
    rows: int

    def __getitem__(self, sequences: slice) -> Recall:
        first, stop, _ = sequences.indices(len(self))
        rows = slice(first * self.rows, stop * self.rows)
        return replace(self, batch=self.batch[rows], answer_BC=self.answer_BC[rows])

    def __len__(self) -> int:
        """Sequences of text."""
        return len(self.batch) // self.rows

    def lost(self, nll_B: Tensor, dense_B: Tensor) -> Tensor:
        """What each sequence's answers lost ``[n]``, nats a token; each row counts alike.

        A row whose answers are likelier than in the dense model lost nothing: it does not make up
        for one that forgot, as a search that may trade one for the other finds out.

        Args:
            nll_B, dense_B: of each row's answers (:func:`answer_loss`), pruned and dense.
        """
        return (nll_B - dense_B).clamp_min(0).view(-1, self.rows).mean(1)


def recall_text(model: Model, text: Batch, *, rows: Rows = FEW, seed: int = 0) -> Recall:
    """Rows of recall for each sequence of a text, the same for the same seed.

    Args:
        model: the dense model.

    Raises:
        CalibrationError: the sequences are too short.
    """
    ids_nW = text.ids_BT.cpu()
    if sequence_tokens(text) < LEAST:
        raise CalibrationError(
            f"recall needs sequences of at least {LEAST} tokens, and these have"
            f" {ids_nW.shape[1]}: give longer ones, or a recall weight of 0"
        )
    cutter = _Cutter(model, ids_nW, rows, seed)
    made = [row for number in range(len(ids_nW)) for row in cutter.rows(number)]
    prompts, continuations, answers = zip(*made, strict=True)
    batch = Batch(
        prompt_BP=torch.tensor(prompts, dtype=torch.long),
        continuation_BC=torch.tensor(continuations, dtype=torch.long),
    )
    return Recall(
        batch=batch.to(model.device),
        answer_BC=torch.tensor(answers).to(model.device),
        rows=rows.count,
    )


def sequence_tokens(text: Batch) -> int:
    """Tokens of a sequence, its prompt and its continuation."""
    return text.prompt_BP.shape[1] + text.continuation_BC.shape[1]


@torch.inference_mode()
def answer_loss(model: Model, recall: Recall, y_BCE: Tensor) -> Tensor:
    """Mean NLL of each row's answers ``[B]``, nats a token, from decode's last stream."""
    at_BC = recall.answer_BC
    logp_RV = F.log_softmax(model.head(y_BCE[at_BC]), -1, dtype=torch.float32)
    nll_R = -logp_RV.gather(-1, recall.batch.continuation_BC[at_BC][:, None])[:, 0]
    nll_BC = torch.zeros(at_BC.shape, device=at_BC.device).masked_scatter(at_BC, nll_R)
    return nll_BC.sum(1) / at_BC.sum(1)


def with_recall(batch: Batch, *, seed: int = 0) -> Batch:
    """The batch, and below it its prompts again, each continued by random pieces of itself."""
    draw = torch.Generator().manual_seed(seed)
    P, C = batch.prompt_BP.shape[1], batch.continuation_BC.shape[1]
    piece = min(PIECE, P)
    rows = []
    for prompt_P in batch.prompt_BP:
        starts = torch.randint(0, P - piece + 1, (-(-C // piece),), generator=draw).tolist()
        rows.append(torch.cat([prompt_P[start : start + piece] for start in starts])[:C])
    copied = Batch(prompt_BP=batch.prompt_BP, continuation_BC=torch.stack(rows))
    return Batch.join([batch, copied])


_Row = tuple[list[int], list[int], list[bool]]
"""Prompt, continuation, and which of the latter are answers."""


class _Cutter:
    """Cuts rows out of token sequences."""

    def __init__(self, model: Model, ids_nW: Tensor, asked: Rows, seed: int) -> None:
        self.model, self.asked, self.rng = model, asked, random.Random(seed)
        self.begin = begin_ids(model.tokenizer) if model.tokenizer is not None else []
        sequences = ids_nW.tolist()
        begun = [row[: len(self.begin)] == self.begin for row in sequences]
        self.begin = self.begin if all(begun) else []
        self.texts = [row[len(self.begin) :] for row in sequences]
        room = len(self.texts[0])
        self.P = min(PROMPT - len(self.begin), room * 2 // 3)
        self.C = min(CONTINUATION, room - self.P, self.P // 3)
        self.words = WordTokens(model.tokenizer)
        self.rare = self.words.rare(self.texts)
        self.colon, self.line = self._ids(":"), self._ids("\n")
        self.places = self._chosen_places()
        self.choices = self._chosen_choices(random.Random(seed))

    def rows(self, number: int) -> list[_Row]:
        """The rows of one sequence."""
        text, asked = self.texts[number], self.asked
        made: list[_Row | None] = [self._returns(text, at) for at in self.places[number]]
        made += [None] * (asked.returns - len(made))
        kinds = self._pairs, self._copy, self._question
        for turn in range(asked.others):
            made.append(kinds[(number * asked.others + turn) % len(kinds)](text))
        *most, last = [row or self._copy(text) for row in made]
        return [*most, self.choices.get(number, last)]

    def _ids(self, text: str) -> list[int]:
        return [] if self.model.tokenizer is None else encode_for(self.model, text)

    def _row(self, prompt: list[int], continuation: list[int], answers: Sequence[int]) -> _Row:
        assert len(prompt) == self.P and len(continuation) == self.C and answers
        return [*self.begin, *prompt], continuation, [i in answers for i in range(self.C)]

    def _returns(self, text: list[int], at: int) -> _Row:
        word = 1
        while word < self.C and self.words.goes_on(text[at + word]):
            word += 1
        return self._row(text[at - self.P : at], text[at : at + self.C], range(word))

    def _copy(self, text: list[int]) -> _Row:
        cue = self.P // 4
        size = self.P - len(self.line) - cue
        start = self.rng.randint(0, len(text) - size)
        piece = text[start : start + size]
        at = self.rng.randint(0, size - cue - self.C) + cue
        prompt = [*piece, *self.line, *piece[at - cue : at]]
        return self._row(prompt, piece[at : at + self.C], range(self.C))

    def _pairs(self, text: list[int]) -> _Row | None:
        words = sorted({token for token in text if token in self.rare})
        width = 2 + len(self.colon) + len(self.line)
        count = min(KEYS, len(words) // 2, self.P // width)
        asked = self.C // width
        if count < 2 or asked < 1:
            return None
        drawn = self.rng.sample(words, 2 * count)
        lines = [
            [key, *self.colon, value, *self.line]
            for key, value in zip(drawn[::2], drawn[1::2], strict=True)
        ]
        told = [token for line in lines for token in line]
        room = self.P - len(told)
        queries = [token for line in self.rng.sample(lines, min(asked, count)) for token in line]
        answers = range(1 + len(self.colon), len(queries), width)
        queries += self.line * self.C if self.line else told
        return self._row([*text[:room], *told], queries[: self.C], answers)

    def _question(self, text: list[int]) -> _Row | None:
        """What stood behind some words; None where the text or the tokenizer has none."""
        if self.model.tokenizer is None:
            return None
        places = [i for i in range(CUE, len(text) - self.C) if text[i] in self.rare]
        if not places:
            return None
        at = self.rng.choice(places)
        cue = str(self.model.tokenizer.decode(text[at - CUE : at])).strip()
        asked = [*self._ids(QUESTION.format(cue)), *text[at - CUE : at]]
        room = self.P - len(asked)
        if room < 12 or len(text) < room:
            return None
        start = min(max(at - self.rng.randint(CUE, room - 2), 0), len(text) - room)
        prompt = [*text[start : start + room], *asked]
        return self._row(prompt, text[at : at + self.C], [0])

    def _chosen_places(self) -> list[list[int]]:
        """Places of each sequence at which a word returns, or fewer where there are none."""
        found: list[tuple[int, int]] = []
        for number, text in enumerate(self.texts):
            places = [
                at
                for at in range(self.P, len(text) - self.C + 1)
                if text[at] in self.rare and text[at] in text[at - self.P : at - AWAY]
            ]
            drawn = self.rng.sample(places, min(PLACES * self.asked.returns, len(places)))
            found += [(number, at) for at in sorted(drawn)]
        gains = self._gains(found)
        chosen: list[list[int]] = []
        for number in range(len(self.texts)):
            own = [(gain, at) for (n, at), gain in zip(found, gains, strict=True) if n == number]
            chosen.append([at for _, at in sorted(own, reverse=True)[: self.asked.returns]])
        return chosen

    def _gains(self, found: list[tuple[int, int]]) -> list[float]:
        """How much likelier the dense model finds each word with all of the prompt."""
        if not found:
            return []
        words = [self.texts[n][at] for n, at in found]
        whole, short = (
            self._log_likelihoods([self.texts[n][at - size : at] for n, at in found], words)
            for size in (self.P, min(SHORT, self.P // 2))
        )
        return (whole - short).tolist()

    def _chosen_choices(self, rng: random.Random) -> dict[int, _Row]:
        """By sequence the question whose letter the dense model is surest of."""
        asker = Asker(
            words=self.words, ids=self._ids, rare=self.rare, texts=self.texts, size=self.P, rng=rng
        )
        found: list[tuple[int, Question]] = [
            (number, question)
            for number in range(self.asked.choices - 1, len(self.texts), self.asked.choices)
            for question in asker.questions(self.texts[number])
        ]
        if not found:
            return {}
        prompts, letters = zip(*(order for _, q in found for order in q.orders), strict=True)
        sure = self._log_likelihoods(list(prompts), list(letters)).view(len(found), -1).amin(1)
        chosen: dict[int, _Row] = {}
        for logp, at in sorted(zip(sure.tolist(), range(len(found)), strict=True)):
            if logp > math.log(SURE):
                number, question = found[at]
                prompt, letter = question.orders[0]
                chosen[number] = self._row(prompt, [letter, *self.line * self.C][: self.C], [0])
        return chosen

    @torch.inference_mode()
    def _log_likelihoods(self, prompts: list[list[int]], words: list[int]) -> Tensor:
        """Of each word behind its prompt, in the dense model."""
        dense, device = Trimmed.dense(self.model), self.model.device
        parts = []
        for first in range(0, len(prompts), 16):
            some = slice(first, first + 16)
            batch = Batch(
                prompt_BP=torch.tensor([self.begin + prompt for prompt in prompts[some]]),
                continuation_BC=torch.tensor(words[some])[:, None],
            ).to(device)
            logits_B1V = self.model.head(dense.last_stream(batch))
            logp_BV = F.log_softmax(logits_B1V[:, 0], -1, dtype=torch.float32)
            parts.append(logp_BV.gather(-1, batch.continuation_BC)[:, 0].cpu())
        return torch.cat(parts)
