"""Options of the command that are a record's fields: type, default and help are said once.

A field's help is what the record's docstring says of it under ``Attributes:``. A tuple is one
option with commas.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from pdtrim.errors import PdtrimError

CONFIG = "config"
"""The parameter that a record's options make up."""


def from_record(
    record: type, *, leave_out: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A verb whose parameter ``config`` becomes options, one for each field of a record.

    Args:
        record: a frozen dataclass, each field with a default and a line in its docstring.
        leave_out: fields that the verb has options of its own for. They arrive with their defaults.
    """
    hints, said = get_type_hints(record), help_of(record)
    chosen = [field for field in fields(record) if field.name not in leave_out]

    def decorate(verb: Callable[..., Any]) -> Callable[..., Any]:
        known = inspect.signature(verb, eval_str=True).parameters
        parameters: list[inspect.Parameter] = []
        for name, parameter in known.items():
            if name == CONFIG:
                parameters += [_option(field, hints[field.name], said) for field in chosen]
            else:
                parameters.append(parameter)

        @functools.wraps(verb)
        def run(**values: Any) -> Any:
            own = {
                field.name: _value(field.name, hints[field.name], values.pop(field.name))
                for field in chosen
            }
            return verb(**values, **{CONFIG: record(**own)})

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


def _option(field: Field[Any], hint: Any, said: dict[str, str]) -> inspect.Parameter:
    assert field.default is not MISSING, f"'{field.name}' has no default"
    name = "--" + field.name.replace("_", "-")
    names = (f"{name}/--no-{name[2:]}",) if hint is bool else (name,)
    listed = get_origin(hint) is tuple
    default = ",".join(map(str, field.default)) if listed else field.default
    annotated: Any = Annotated  # made here, which type checkers do not read
    kind = annotated[str if listed else hint, typer.Option(*names, help=said[field.name])]
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind
    )


def _value(name: str, hint: Any, given: Any) -> Any:
    if get_origin(hint) is not tuple:
        return given
    kind, _ = get_args(hint)
    words = [word.strip() for word in given.split(",") if word.strip()]
    try:
        return tuple(kind(word) for word in words)
    except ValueError:
        option = "--" + name.replace("_", "-")
        raise PdtrimError(f"{option} '{given}': give numbers such as 0,1,2") from None
