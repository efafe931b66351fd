"""Which tokens of a tokenizer begin a word, and which go on with one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

COMMON = 1 / 500
"""A token that is more of a text than this is no word to ask for."""
MARK = "\u2581"
"""Begins a word in tokenizers that do not spell tokens as bytes."""


class WordTokens:
    """Looks tokens up in a tokenizer, each once; without a tokenizer each token is a word."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.known: dict[int, str] = {}

    def starts(self, token: int) -> bool:
        """Whether a token begins a word of some letters."""
        if self.tokenizer is None:
            return True
        text = self._text(token)
        return text.startswith(" ") and len(text) > 3 and text[1:].isalpha()

    def goes_on(self, token: int) -> bool:
        """Whether a token belongs to the word before it."""
        return self.tokenizer is not None and self._text(token).isalpha()

    def word(self, token: int) -> str:
        """A token's letters, without what marks the begin of a word."""
        return self._text(token)[1:]

    def rare(self, texts: Iterable[list[int]]) -> set[int]:
        """Tokens that begin a word and are not common in these texts."""
        counts = Counter(token for text in texts for token in text)
        limit = COMMON * sum(counts.values())
        return {token for token, n in counts.items() if n <= limit and self.starts(token)}

    def _text(self, token: int) -> str:
        if token not in self.known:
            piece = str(self.tokenizer.convert_ids_to_tokens(token))
            marked = piece.startswith(MARK)  # which a decoder takes off the first word of a text
            text = piece if marked else self.tokenizer.convert_tokens_to_string([piece])
            self.known[token] = text.replace(MARK, " ")
        return self.known[token]
