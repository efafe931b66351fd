"""Records: frozen, keyword-only, and they refuse keys that they do not know."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

MOST_TOKENS = 2**31 - 1
"""Of any count of tokens in a record: more than any prompt has, and exact in every arithmetic."""

SHOWN = 60  # letters of a user's text that a message holds


class Frozen(BaseModel):
    """A record that cannot change and that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Part(BaseModel):
    """A record of some keys of a file that another program, or another version, wrote."""

    model_config = ConfigDict(frozen=True, extra="ignore")


def by_name(choice: Any) -> dict[str, Any]:
    """The records of an annotated union, in its order, by the default of their field ``name``."""
    kinds = get_args(get_args(choice)[0])
    return {kind.model_fields["name"].default: kind for kind in kinds}


def first_problem(error: ValidationError) -> str:
    """The first of pydantic's complaints, on one line."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    text = str(problem["msg"]).removeprefix("Value error, ")
    return f"{where}: {text}" if where else text


def shortened(text: str) -> str:
    """A user's text as a message may hold it: printable, its end left out where it is long."""
    begin = "".join(letter if letter.isprintable() else "?" for letter in text[:SHOWN])
    return begin if len(text) <= SHOWN else f"{begin}..."
