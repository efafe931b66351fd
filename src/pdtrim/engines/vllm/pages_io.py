"""Tokens in and out of an engine's pages.

Writing is the backend's own function. Reading is not offered by any, so the layouts of two are
known here, and :func:`check_readable` tries them out before a server starts.

Shapes: B pages of P tokens, G KV heads, M tokens, D head width, E twice that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pdtrim.errors import PlanError


def _cpu_attn(pages_BGPE: Tensor) -> tuple[Tensor, Tensor]:
    """A head's page is its keys ``[D, P]``, then its values ``[P, D]``."""
    B, G, P, E = pages_BGPE.shape
    k, v = pages_BGPE.reshape(B, G, 2, P * E // 2).unbind(2)
    return k.view(B, G, E // 2, P).mT, v.view(B, G, P, E // 2)


def _cpu_attn_amx(pages_BGPE: Tensor) -> tuple[Tensor, Tensor]:
    """The same in tiles of AMX: keys ``[P/16, D/2, 16, 2]``, values ``[D/16, P/2, 16, 2]``."""
    B, G, P, E = pages_BGPE.shape
    D = E // 2
    k, v = pages_BGPE.reshape(B, G, 2, P * D).unbind(2)
    k_BGPD = k.view(B, G, P // 16, D // 2, 16, 2).transpose(3, 4).reshape(B, G, P, D)
    v_BGPD = v.view(B, G, D // 16, P // 2, 16, 2).permute(0, 1, 3, 5, 2, 4).reshape(B, G, P, D)
    return k_BGPD, v_BGPD


def _flash_attn(pages_BGPE: Tensor) -> tuple[Tensor, Tensor]:
    """A token's row is its key, then its value."""
    k, v = pages_BGPE.chunk(2, dim=-1)
    return k, v


BACKENDS = ("CPU_ATTN", "FLASH_ATTN")
LAYOUTS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "CPU_ATTN": _cpu_attn,
    "CPU_ATTN in tiles of AMX": _cpu_attn_amx,
    "FLASH_ATTN": _flash_attn,
}
"""Pages ``[B, G, P, 2 * D]`` to keys and values ``[B, G, P, D]``, by the layout's name."""


def layout_of(attention: Any) -> str:
    """The name of the layout in which a layer's backend keeps its pages."""
    name = str(attention.attn_backend.get_name())
    return f"{name} in tiles of AMX" if getattr(attention, "isa", None) == "amx" else name


def numbers(pages: Sequence[int], device: torch.device) -> Tensor:
    """Page numbers ``[B]`` where the cache lies: once for all layers that share them."""
    made = torch.tensor(pages, dtype=torch.long, pin_memory=device.type == "cuda")
    return made.to(device, non_blocking=True)


def slots(pages_B: Tensor, page: int, tokens: int) -> Tensor:
    """The first M tokens of these pages, as an engine counts the slots of a cache ``[M]``."""
    at_P = torch.arange(page, device=pages_B.device)
    return (pages_B[:, None] * page + at_P).flatten()[:tokens]


def gather(attention: Any, cache: Tensor, pages_B: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values ``[G, M, D]`` of the first M tokens in these pages of the cache."""
    read = LAYOUTS[layout_of(attention)]
    k_GMD, v_GMD = (
        x_BGPD.transpose(0, 1).flatten(1, 2)[:, :tokens].contiguous()
        for x_BGPD in read(cache[pages_B])
    )
    return k_GMD, v_GMD


def scatter(attention: Any, cache: Tensor, slots_M: Tensor, k_GMD: Tensor, v_GMD: Tensor) -> None:
    """Write keys and values ``[G, M, D]`` to these slots of the cache."""
    if not len(slots_M):
        return
    attention.impl.do_kv_cache_update(
        attention,
        k_GMD.transpose(0, 1).contiguous(),
        v_GMD.transpose(0, 1).contiguous(),
        cache,
        slots_M,
    )


def check_readable(attention: Any, cache: Tensor) -> None:
    """Raise PlanError unless :func:`gather` reads what the backend writes into such a cache."""
    name = layout_of(attention)
    problem = f"attention backend {name} keeps its pages in a form that pdtrim cannot read"
    if name in LAYOUTS:
        G, P, E = cache.shape[1:]
        trial = torch.zeros_like(cache[:2])
        written = torch.randn(2, G, P + 1, E // 2).to(cache)  # a page and a part of another
        pages_B = numbers([1, 0], cache.device)
        scatter(attention, trial, slots(pages_B, P, P + 1), *written)
        if torch.equal(torch.stack(gather(attention, trial, pages_B, P + 1)), written):
            return
    raise PlanError(
        f"{problem}: choose --attention-backend {' or '.join(BACKENDS)}, or plan without a codec"
    )
