"""Errors that name a user's mistake. The command line prints them as one line and exits with 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

LONGEST = 1000
"""Characters of a message: what a file holds may stand in it, and be of any length."""


class PdtrimError(ValueError):
    """Something the user asked for cannot be done; the message says what to do instead.

    The message is one line of printable characters, whatever was put into it.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(plain_line(message))


class ModelError(PdtrimError):
    """A model cannot be read, or is not one that pdtrim supports."""


class PlanError(PdtrimError):
    """A plan is invalid, or does not fit the model or the checkpoint it is used with."""


class CalibrationError(PdtrimError):
    """Calibration text is missing, unreadable or too short."""


class WireError(PdtrimError):
    """A KV frame is refused: wrong magic, version, digest, layout or length."""


class RuntimeFailure(PdtrimError):
    """A stage process refused a request or ended; the message carries its last words."""


class NotFinite(PdtrimError):
    """A number that must be finite is NaN or infinite; the message says where it came up."""


NAMED = (KeyError, TypeError, AttributeError, IndexError, RecursionError, MemoryError)
"""Errors whose text says little without their name."""


def plain_line(text: str) -> str:
    """A text on one line: escapes for what cannot be printed, the middle of a long one left out."""
    text = text if len(text) < 2 * LONGEST else text[:LONGEST] + text[-LONGEST:]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 4 :]}"


@contextmanager
def border(kind: type[PdtrimError], where: str) -> Iterator[None]:
    """Turn whatever a library raises over a user's input into one line with the place.

    Args:
        kind: what is raised instead.
        where: the place, such as ``cannot load 'model.gguf'``.

    Raises:
        PdtrimError: of this kind; one that is raised inside passes as it is.
    """
    try:
        yield
    except PdtrimError:
        raise
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a library in Rust that panics raises no Exception
        raise kind(f"{where}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """What an error says, on one line; its name where it says nothing by itself."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    name = type(error).__name__
    if not lines:
        return name
    return f"{name}: {lines[0]}" if isinstance(error, NAMED) else lines[0]
