"""Which tokens of a tokenizer begin a word, and which go on with one."""

from __future__ import annotations

from typing import Any


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
        return text[:1] in (" ", "\u2581") and len(text) > 3 and text[1:].isalpha()

    def goes_on(self, token: int) -> bool:
        """Whether a token belongs to the word before it."""
        return self.tokenizer is not None and self._text(token).isalpha()

    def word(self, token: int) -> str:
        """A token's letters, without what marks the begin of a word."""
        return self._text(token)[1:]

    def _text(self, token: int) -> str:
        if token not in self.known:
            piece = str(self.tokenizer.convert_ids_to_tokens(token))
            self.known[token] = piece.replace("\u0120", " ")
        return self.known[token]
