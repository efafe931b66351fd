"""Text to token ids, without surprises: cleaned once, checked once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pdtrim.errors import CalibrationError, border
from pdtrim.models.model import Model
from pdtrim.reading.text import clean


def begin_ids(tokenizer: Any) -> list[int]:
    """The token that this tokenizer puts before every text, if it does."""
    first = list(tokenizer("").input_ids[:1])
    return first if first == [tokenizer.bos_token_id] else []


def encode(tokenizer: Any, text: str, vocabulary: int, *, special: bool = False) -> list[int]:
    """Ids of a text of any length.

    Args:
        vocabulary: rows of the model's embedding.
        special: with the tokens that the tokenizer puts around every text.

    Raises:
        CalibrationError: the tokenizer fails, or knows tokens that the model does not.
    """
    with border(CalibrationError, "the tokenizer cannot read the text"):
        cleaned = clean(text)
        ids = list(tokenizer(cleaned, add_special_tokens=special, verbose=False).input_ids)
    check_ids(ids, vocabulary)
    return ids


def encode_for(model: Model, text: str) -> list[int]:
    """Ids of a text for a model, with no special tokens added.

    Raises:
        ModelError: the model has no tokenizer.
        CalibrationError: as :func:`encode`.
    """
    return encode(model.need_tokenizer(), text, int(model.config.vocab_size))


def check_ids(ids: Iterable[int], vocabulary: int) -> None:
    """Refuse ids that have no row in the embedding.

    Raises:
        CalibrationError: naming the first.
    """
    for token in ids:
        if not 0 <= token < vocabulary:
            raise CalibrationError(
                f"token id {token} is not in the vocabulary of {vocabulary}: the tokenizer has"
                " tokens that the model was not trained with"
            )


def check_length(tokens: int, config: Any, what: str) -> None:
    """Refuse sequences that are longer than the model's positions.

    Raises:
        CalibrationError: they are.
    """
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and tokens > int(longest):
        raise CalibrationError(
            f"{what} of {tokens} tokens are longer than the {longest} that the model reads"
        )
