"""Options of the command that are a record's fields: type, default and help are said once.

A field's help is what the record's docstring says of it under ``Attributes:``. A field without a
default must be given. A tuple is one option with commas, or one that is given again for each of
its entries; an entry that is a pair is ``NAME=FILE``.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from pdtrim.errors import PdtrimError

CONFIG = "config"
"""The parameter that a record's options make up, unless the verb names another."""


def from_record(
    record: type,
    *,
    again: tuple[str, ...] = (),
    names: Mapping[str, tuple[str, ...]] = {},
    arguments: tuple[str, ...] = (),
    into: str = CONFIG,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A verb with a parameter that becomes options, one for each field of a record.

    Args:
        record: a frozen dataclass, each field with a line in its docstring.
        again: tuples whose option is given again for each entry.
        names: of options that are not called as their fields are.
        arguments: fields that are given by their place.
        into: the parameter; a verb may have several, each with a record.
    """
    hints, said = get_type_hints(record), help_of(record)
    chosen = {
        field.name: _Option(
            field,
            hints[field.name],
            said[field.name],
            field.name in again,
            ()
            if field.name in arguments
            else names.get(field.name, ("--" + field.name.replace("_", "-"),)),
        )
        for field in fields(record)
    }

    def decorate(verb: Callable[..., Any]) -> Callable[..., Any]:
        parameters: list[inspect.Parameter] = []
        for name, parameter in inspect.signature(verb, eval_str=True).parameters.items():
            options = [option.parameter for option in chosen.values()]
            parameters += options if name == into else [parameter]

        @functools.wraps(verb)
        def run(**values: Any) -> Any:
            own = {name: option.value(values.pop(name)) for name, option in chosen.items()}
            return verb(**values, **{into: record(**own)})

        keyword = inspect.Parameter.KEYWORD_ONLY
        made = [parameter.replace(kind=keyword) for parameter in parameters]
        run.__signature__ = inspect.Signature(made)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in made}
        return run

    return decorate


def help_of(record: type) -> dict[str, str]:
    """What a record's docstring says of its fields, each as a sentence."""
    text = inspect.getdoc(record) or ""
    _, _, attributes = text.partition("\nAttributes:\n")
    block = re.split(r"\n(?=\S)", attributes)[0]
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?= {4}\S)", "\n" + block)[1:]:
        names, _, words = " ".join(entry.split()).partition(": ")
        words = words.replace("``", "")
        for name in names.split(", "):
            found[name] = words[:1].upper() + words[1:]
    return found


class _Option:
    """A field as an option: what typer is told of it, and the field's value of what typer gives."""

    def __init__(
        self, field: Field[Any], hint: Any, said: str, again: bool, names: tuple[str, ...]
    ) -> None:
        self.name, self.again, self.option = field.name, again, names[0] if names else ""
        self.entry = get_args(hint)[0] if get_origin(hint) is tuple else None
        self.pairs = get_origin(self.entry) is tuple
        needed = field.default is MISSING
        default: Any = inspect.Parameter.empty if needed else field.default
        if hint is bool:
            names = (f"{self.option}/--no-{self.option[2:]}",)
        if again:
            hint = list[str] if self.pairs else list[self.entry]  # type: ignore[name-defined]
            said = f"{said.removesuffix('.')}; give it again for more."
            default = default if needed else list(default)
        elif self.entry is not None:
            hint, default = str, ",".join(map(str, default))
        place: Any = typer.Option if names else typer.Argument
        annotated: Any = Annotated  # made here, which type checkers do not read
        self.parameter = inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=annotated[hint, place(*names, help=said)],
        )

    def value(self, given: Any) -> Any:
        """What the record takes.

        Raises:
            PdtrimError: words where numbers belong, or no pair.
        """
        if self.entry is None:
            return given
        if self.again:
            return tuple(self._pair(text) if self.pairs else text for text in given)
        try:
            return tuple(self.entry(word.strip()) for word in given.split(",") if word.strip())
        except ValueError:
            raise PdtrimError(f"{self.option} '{given}': give numbers such as 0,1,2") from None

    def _pair(self, text: str) -> tuple[str, Path]:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise PdtrimError(f"{self.option} '{text}': give NAME=FILE")
        return name, Path(path)
