"""The pages of prompts that decode preempts: they wait in host memory.

vLLM frees the pages of a request that it preempts, and computes the whole request again later.
Decode cannot compute a prompt as prefill did, and prefill has freed its own copy. So the prompt's
pages are copied to host memory before they are overwritten, and written back into new pages when
the request has its turn again: a second handover of the very same bytes. The generated tokens are
computed again with decode's own blocks, as vLLM does for every preempted request.

Shapes: P pages of one layer, the rest as the engine has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Pages = tuple[list[int], ...]
"""Page numbers by cache group, without null blocks."""


class HostPages:
    """Prompts of preempted requests, copied out of a worker's cache.

    Args:
        caches: each layer's cache, pages first.
        group_of: each layer's cache group.
    """

    def __init__(self, caches: Mapping[str, Tensor], group_of: Mapping[str, int]) -> None:
        self._caches = caches
        self._group_of = group_of
        self._held: dict[str, dict[str, Tensor]] = {}

    def keep(self, request: str, pages: Sequence[Sequence[int]]) -> None:
        """Copy a request's pages to the host. They may be overwritten afterwards."""
        self._held[request] = {
            layer: _on_host(cache[_index(pages[self._group_of[layer]], cache)])
            for layer, cache in self._caches.items()
        }

    def restore(self, request: str, pages: Sequence[Sequence[int]]) -> None:
        """Write a request's last pages back: as many in each group as are given."""
        for layer, held_P in self._held.pop(request).items():
            cache = self._caches[layer]
            at_P = _index(pages[self._group_of[layer]], cache)
            cache[at_P] = held_P[len(held_P) - len(at_P) :].to(cache.device)

    def drop(self, request: str) -> None:
        """Forget a request, if it is held."""
        self._held.pop(request, None)


def _index(pages: Sequence[int], cache: Tensor) -> Tensor:
    return torch.tensor(pages, dtype=torch.long, device=cache.device)


def _on_host(pages: Tensor) -> Tensor:
    """Copied when this returns: no stream orders the next READ into these pages."""
    return torch.empty_like(pages, device="cpu", pin_memory=pages.is_cuda).copy_(pages)
