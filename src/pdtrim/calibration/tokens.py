"""Text to token ids, without surprises."""

from __future__ import annotations

from typing import Any


def begin_ids(tokenizer: Any) -> list[int]:
    """The token that this tokenizer puts before every text, if it does."""
    first = list(tokenizer("").input_ids[:1])
    return first if first == [tokenizer.bos_token_id] else []


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text of any length, with no special tokens added."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
