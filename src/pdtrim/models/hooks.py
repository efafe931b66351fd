"""Look at what modules read while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

Note = Callable[[int, Tensor, dict[str, Any]], None]
"""Takes a module's number, the stream that it reads, and what else it is given by name."""


@contextmanager
def before_each(modules: Iterable[nn.Module], note: Note) -> Iterator[None]:
    """Inside, ``note`` is called before each run of one of the modules."""

    def hook_of(number: int) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: Any, given: tuple[Any, ...], options: dict[str, Any]) -> None:
            note(number, given[0] if given else options["hidden_states"], options)

        return hook

    with ExitStack() as stack:
        for number, module in enumerate(modules):
            hook = module.register_forward_pre_hook(hook_of(number), with_kwargs=True)
            stack.callback(hook.remove)
        yield


@contextmanager
def reading(module: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, what a module reads is appended to a list."""
    seen: list[Tensor] = []
    with before_each([module], lambda number, x, options: seen.append(x)):
        yield seen
