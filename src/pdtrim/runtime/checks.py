"""What a caller gives to a session, checked before a process hears of it."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from pdtrim.errors import PdtrimError
from pdtrim.stage.sampling import Sampling

SHOWN = 40  # characters of a wrong value


def whole(value: object, what: str) -> int:
    """A whole number of any type that has one; True and False are none.

    Raises:
        PdtrimError: anything else.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise PdtrimError(f"{what} {shown(value)} is no whole number") from None


def listed(values: object, what: str) -> list[Any]:
    """Several values as a list; a text is no list of its letters.

    Raises:
        PdtrimError: it is not several values.
    """
    if isinstance(values, Iterable) and not isinstance(values, (str, bytes, dict)):
        return list(values)
    raise PdtrimError(f"{what} must be a list, and is {shown(values)}")


def token_ids(prompt: object, vocab_size: int) -> list[int]:
    """A prompt's token ids, each in the vocabulary.

    Raises:
        PdtrimError: one that is none.
    """
    tokens = [whole(token, "token id") for token in listed(prompt, "a prompt of token ids")]
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise PdtrimError(f"token id {shown(token)} is not in the vocabulary")
    return tokens


def sampling_fields(sampling: Sampling | None) -> dict[str, Any]:
    """How to sample, as an order carries it.

    Raises:
        PdtrimError: not a :class:`Sampling`, or one whose values were changed to wrong ones.
    """
    config = Sampling() if sampling is None else sampling
    if not isinstance(config, Sampling):
        raise PdtrimError(f"sampling must be a Sampling, and is {shown(config)}")
    return asdict(replace(config))  # checked anew


def shown(value: object) -> str:
    """A wrong value in a message: short, and even if it cannot be printed."""
    try:
        text = repr(value)
    except Exception:  # an integer of too many digits, an object that fails at it
        return f"({type(value).__name__}, which cannot be printed)"
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
