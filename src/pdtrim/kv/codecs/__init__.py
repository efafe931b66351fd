"""Codecs: in how many bits the kept pairs travel. One file a method."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import Field, ValidationError

from pdtrim.errors import PlanError
from pdtrim.kv.codecs.base import CodecBase
from pdtrim.kv.codecs.entropy import Entropy
from pdtrim.kv.codecs.fp8 import Fp8
from pdtrim.kv.codecs.integer import Integer
from pdtrim.kv.codecs.lossless import Lossless
from pdtrim.kv.codecs.raw import Raw
from pdtrim.records import by_name, first_problem, shortened

Codec = Annotated[Raw | Fp8 | Integer | Entropy | Lossless, Field(discriminator="name")]
"""Any codec, as a plan writes it: ``{"name": ..., parameters}``."""

CODECS: dict[str, type[CodecBase]] = by_name(Codec)

MOST_LETTERS = 1000  # of a codec's or a policy's text

PRESETS = ", ".join(kind.presets for kind in CODECS.values())


def parse_codec(text: str) -> CodecBase:
    """A codec from a preset and options, such as ``int4:group=32,rotate=true``.

    Raises:
        PlanError: no such preset or option, or a value out of range.
    """
    said, text = f"codec '{shortened(text)}'", text.strip().lower()
    if len(text) > MOST_LETTERS or not (text.isascii() and text.isprintable()):
        raise PlanError(f"{said} is no codec: write plain letters, {MOST_LETTERS} at most")
    preset, *options = re.split("[:,]", text)
    found = ((kind, kind.preset(preset)) for kind in CODECS.values())
    kind, given = next((pair for pair in found if pair[1] is not None), (None, None))
    if kind is None or given is None:
        raise PlanError(f"{said}: '{shortened(preset)}' is not one of {PRESETS}")
    values: dict[str, Any] = {"name": kind.model_fields["name"].default, **given}
    for option in options:
        key, equals, value = (part.strip() for part in option.partition("="))
        if not equals or key in values:
            raise PlanError(f"{said}: '{shortened(option)}' is not a new option key=value")
        values[key] = value
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        known = ", ".join(sorted(kind.model_fields.keys() - {"name", "k_bits", "v_bits"})) or "none"
        raise PlanError(
            f"{said}: {first_problem(error)} (a preset is {PRESETS}; its options: {known})"
        ) from error


__all__ = [
    "CODECS",
    "Codec",
    "CodecBase",
    "Entropy",
    "Fp8",
    "Integer",
    "Lossless",
    "Raw",
    "parse_codec",
]
