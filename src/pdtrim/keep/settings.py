"""Settings that a kept measurement was made by; other settings are refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pdtrim.errors import PdtrimError
from pdtrim.versions import versions

Settings = dict[str, Any]
"""All that a kept value depends on; nested ones are compared entry by entry."""

HASH = re.compile("[0-9a-f]{64}")


def plain(settings: Settings) -> Settings:
    """As JSON gives them back."""
    return json.loads(json.dumps(settings, default=str))


def package_versions() -> dict[str, str]:
    """Of the packages that make numbers; not Python's own."""
    return {name: version for name, version in versions().items() if name != "python"}


def check_same(path: Path, before: Settings, now: Settings) -> None:
    """Compare the settings of a file with those asked for.

    Raises:
        PdtrimError: they differ; the line names the first that does, with both values.
    """
    old, new = _flat(before), _flat(plain(now))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise PdtrimError(
                f"{path} was made with {key} {_short(old.get(key))}, now it is"
                f" {_short(new.get(key))}: delete it, or give another -o"
            )


def _flat(settings: Settings) -> Settings:
    """Nested settings by dotted names."""
    flat: Settings = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": part for inner, part in _flat(value).items()}
        else:
            flat[key] = value
    return flat


def _short(value: Any) -> str:
    if isinstance(value, str) and HASH.fullmatch(value):
        return f"{value[:12]}..."
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
