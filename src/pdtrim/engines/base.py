"""What an engine offers that serves exported pairs: it checks a plan, and names its processes.

pdtrim starts the processes and keeps them together (``supervise.py``); how requests run is the
engine's. An engine is one package with one :class:`Engine`, listed in ``engines/__init__.py``.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pdtrim.plan import PrunePlan


@dataclass(frozen=True, kw_only=True)
class Process:
    """One process to start.

    Attributes:
        name: such as ``prefill 0`` or ``router``.
        env: what it needs beside the environment that it inherits.
        health: path below ``url`` that answers 200 once it serves.
    """

    name: str
    command: tuple[str, ...]
    env: dict[str, str]
    url: str
    health: str = "/health"

    @property
    def shell(self) -> str:
        """The line to type into a shell."""
        env = (f"{key}={shlex.quote(value)}" for key, value in self.env.items())
        return " ".join((*env, shlex.join(self.command)))


@dataclass(frozen=True, kw_only=True)
class Engine:
    """An engine's part of serving a pair. Its configs are its own.

    Attributes:
        page_size: tokens of its page for a plan, by what the user asks; None is no wish.
        check_plan: refuses, with PlanError, a plan that it cannot serve with pages of that size.
        processes: what to start for a config, servers first, the router last. Refuses a pair that
            it cannot serve; starts nothing.
        check_runnable: refuses, with PdtrimError, what is missing on this machine.
        advice: what a pair's plan could do better on it, in a line; None if nothing.
        room: how many requests a server that answers can hold, in a line; None of one that keeps
            none.
    """

    name: str
    page_size: Callable[[PrunePlan, int | None], int]
    check_plan: Callable[[PrunePlan, int], None]
    processes: Callable[..., Sequence[Process]]
    check_runnable: Callable[[Any], None]
    advice: Callable[[Any], str | None]
    room: Callable[[Any, Process], str | None]
