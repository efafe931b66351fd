"""Questions whose answer is the letter of an option: does the model still bind one to the other?

A piece of the text, four words, and the question which of them stood in it. A prefill that skips
the blocks in which an option's tokens learn how they relate to the question keeps web text and the
recall of words, and answers such questions by chance. The options are words of the text itself; no
question of a benchmark is used, but its form (Robinson et al., 2210.12353, call the gift *multiple
choice symbol binding*).

A small model may not have the gift. A question is a row only where the dense model is sure of the
right letter, in two orders of the options, so that such a model has none.

Training text (``recall_training.py``) asks several questions about one piece, one after the other.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from pdtrim.calibration.word_tokens import WordTokens

QUESTION = "\nQuestion: Which of these words is in the text above?\n{}Answer:"
LETTERS = "ABCD"
TRIES = 4
"""Questions that are tried for a row, as not every piece has the words."""
SURE = 0.5
"""Likelihood of the right letter above which the dense model is sure."""
LEAST = 12
"""Tokens of the piece of text, at least."""

Ids = Callable[[str], list[int]]
"""Token ids of a text, without the special ones that a prompt begins with."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question with its options in two orders.

    Attributes:
        orders: the prompts, without the special tokens that a prompt begins with, and the letter
            that answers each: a model that likes a letter is right in one of them at most.
    """

    orders: list[tuple[list[int], int]]


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Questions about one piece of text, one after the other, each with its letter.

    Attributes:
        prompt: the piece and the first question, up to its letter.
        continuation: that letter, the next question, its letter and so on.
        letters: where in the continuation the letters are.
    """

    prompt: list[int]
    continuation: list[int]
    letters: list[int]


@dataclass(kw_only=True, eq=False)
class Asker:
    """Makes questions about token sequences.

    Attributes:
        rare: tokens of words that are no common ones.
        texts: all sequences, whose words are the wrong options.
        size: tokens of a question's prompt.
    """

    words: WordTokens
    ids: Ids
    rare: set[int]
    texts: Sequence[list[int]]
    size: int
    rng: random.Random
    letters: list[int] = field(init=False)
    options: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.letters = self._letter_ids()
        self.options = sorted({token for text in self.texts for token in self._whole(text)})

    def questions(self, text: list[int]) -> list[Question]:
        """Some questions about one sequence; fewer where it has no words to ask for."""
        if not self.letters:
            return []
        made = (self._question(text) for _ in range(TRIES))
        return [question for question in made if question is not None]

    def turns(self, text: list[int], tokens: int) -> Turns | None:
        """A row of questions about one piece of a sequence, none of whose words comes twice.

        Args:
            tokens: of the continuation; a question that has no room is cut.

        Returns:
            None where there are no letters, or too few words.
        """
        drawn = self._drawn(text) if self.letters else None
        if drawn is None:
            return None
        text, right, wrong = drawn
        self.rng.shuffle(wrong)
        first, letter = self._turn(right, wrong)
        piece = self._piece(text, right, first)
        if not piece:
            return None
        later = sorted({*self._whole(piece)} - {right})
        self.rng.shuffle(later)
        continuation, letters = [letter], [0]
        while len(continuation) < tokens:
            if not later or len(wrong) < len(LETTERS):
                return None
            question, letter = self._turn(later.pop(), wrong)
            continuation += [*question, letter]
            letters.append(len(continuation) - 1)
        return Turns(
            prompt=[*piece, *first],
            continuation=continuation[:tokens],
            letters=[at for at in letters if at < tokens],
        )

    def _turn(self, right: int, wrong: list[int]) -> tuple[list[int], int]:
        """A question and its letter; the wrong options are taken off their list."""
        options = [wrong.pop() for _ in LETTERS[1:]]
        at = self.rng.randrange(len(LETTERS))
        options.insert(at, right)
        return self._asked(options), self.letters[at]

    def _question(self, text: list[int]) -> Question | None:
        drawn = self._drawn(text)
        if drawn is None:
            return None
        text, right, wrong = drawn
        others = self.rng.sample(wrong, len(LETTERS) - 1)
        at = self.rng.randrange(len(LETTERS))
        orders = []
        for place in (at, (at + 2) % len(LETTERS)):
            question = self._asked([*others[:place], right, *others[place:]])
            piece = self._piece(text, right, question)
            if not piece:
                return None
            orders.append(([*piece, *question], self.letters[place]))
        return Question(orders=orders)

    def _drawn(self, text: list[int]) -> tuple[list[int], int, list[int]] | None:
        """A sequence from a random place on, a word that it holds, and those that it does not."""
        start = self.rng.randrange(max(len(text) - self.size, 0) + 1)
        near = {self.words.word(token).lower() for token in text[start : start + self.size]}
        wrong = [t for t in self.options if self.words.word(t).lower() not in near]
        held = self._whole(text[start : start + self.size // 2])
        if not held or len(wrong) < len(LETTERS):
            return None
        return text[start:], self.rng.choice(held), wrong

    def _asked(self, options: list[int]) -> list[int]:
        lines = [f"{a}. {self.words.word(t)}\n" for a, t in zip(LETTERS, options, strict=True)]
        return self.ids(QUESTION.format("".join(lines)))

    def _piece(self, text: list[int], right: int, question: list[int]) -> list[int]:
        """What has room before a question; nothing where that is too little, or lacks the word."""
        room = max(self.size - len(question), 0)
        piece = text[:room]
        return piece if LEAST <= room <= len(text) and right in piece[:-1] else []

    def _whole(self, text: list[int]) -> list[int]:
        """Rare tokens that are a whole word."""
        return [
            token
            for token, after in pairwise(text)
            if token in self.rare and not self.words.goes_on(after)
        ]

    def _letter_ids(self) -> list[int]:
        """The token of each letter behind ``Answer:``; none where a letter is not one token."""
        if self.words.tokenizer is None:
            return []
        before = self.ids("Answer:")
        found = [self.ids(f"Answer: {letter}") for letter in LETTERS]
        one = all(ids[:-1] == before for ids in found)
        return [ids[-1] for ids in found] if one else []
