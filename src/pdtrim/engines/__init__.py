"""The engines that serve exported pairs, by name."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from pdtrim.errors import PdtrimError

if TYPE_CHECKING:
    from pdtrim.engines.base import Engine

ENGINES = {"vllm": "pdtrim.engines.vllm.launch"}
"""Modules that hold an ``ENGINE``."""


def engine_named(name: str) -> Engine:
    """An engine; its package is imported now.

    Raises:
        PdtrimError: there is none of this name.
    """
    if name not in ENGINES:
        raise PdtrimError(f"unknown engine '{name}': use one of {', '.join(ENGINES)}")
    engine: Engine = import_module(ENGINES[name]).ENGINE
    return engine
