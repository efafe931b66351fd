"""Tokens in and out of an engine's pages.

Writing is the backend's own function. Reading is not offered by any, so the layouts of two are
known here, and :func:`check_readable` tries them out before a server starts. Where a token of a
head is a row of its own, codecs read and write the pages themselves, by :func:`rows_of`.

Shapes: B pages of P tokens, G KV heads, T rows of a cache, M tokens, D head width, E twice that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a backend keeps its pages.

    Attributes:
        read: pages ``[B, G, P, 2 * D]`` to keys and values ``[B, G, P, D]``.
        rows: what ``read`` makes are views, of the whole cache too.
    """

    read: Callable[[Tensor], tuple[Tensor, Tensor]]
    rows: bool = False


BACKENDS = ("CPU_ATTN", "FLASH_ATTN")
LAYOUTS = {
    "CPU_ATTN": Layout(read=_cpu_attn),
    "CPU_ATTN in tiles of AMX": Layout(read=_cpu_attn_amx),
    "FLASH_ATTN": Layout(read=_flash_attn, rows=True),
}
"""By the layout's name."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A layer's cache as a codec sees it.

    Attributes:
        k_GTD: keys, a token a row; rows between pages may be other heads' or nobody's.
        v_GTD: values in the same way.
        step: rows from one page to the next.
    """

    k_GTD: Tensor
    v_GTD: Tensor
    step: int


def layout_of(attention: Any) -> str:
    """The name of the layout in which a layer's backend keeps its pages."""
    name = str(attention.attn_backend.get_name())
    return f"{name} in tiles of AMX" if getattr(attention, "isa", None) == "amx" else name


def numbers(pages: Sequence[int], device: torch.device) -> Tensor:
    """Page numbers ``[B]`` where the cache lies: once for all layers that share them."""
    made = torch.tensor(pages, dtype=torch.long, pin_memory=device.type == "cuda")
    return made.to(device, non_blocking=True)


def slots(pages_B: Tensor, page: int, tokens: int, step: int | None = None) -> Tensor:
    """The first M tokens of these pages of P tokens ``[M]``.

    As an engine counts the slots of a cache, or, given their ``step``, as rows of :class:`Rows`.
    """
    at_P = torch.arange(page, device=pages_B.device)
    return (pages_B[:, None] * (step or page) + at_P).flatten()[:tokens]


def rows_of(attention: Any, cache: Tensor, heads: int) -> Rows | None:
    """The first G heads of a cache as rows; None if its backend or its strides have none."""
    layout = LAYOUTS.get(layout_of(attention))
    if layout is None or not layout.rows:
        return None
    (B, _, P, _), (page, head, row, channel) = cache.shape, cache.stride()
    if channel != 1 or page % row:
        return None
    step = page // row
    k_GTD, v_GTD = (
        x_BGPD.as_strided((heads, (B - 1) * step + P, x_BGPD.shape[3]), (head, row, 1))
        for x_BGPD in layout.read(cache)
    )
    return Rows(k_GTD=k_GTD, v_GTD=v_GTD, step=step)


def gather(attention: Any, cache: Tensor, pages_B: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values ``[G, M, D]`` of the first M tokens in these pages of the cache."""
    read = LAYOUTS[layout_of(attention)].read
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
    """Raise PlanError unless what the backend writes into such a cache is read here.

    By :func:`gather`, and by :func:`rows_of` where there are rows.
    """
    name = layout_of(attention)
    problem = f"attention backend {name} keeps its pages in a form that pdtrim cannot read"
    if name in LAYOUTS:
        G, P, E = cache.shape[1:]
        trial = torch.zeros_like(cache[:2])
        written = torch.randn(2, G, P + 1, E // 2).to(cache)  # a page and a part of another
        pages_B = numbers([1, 0], cache.device)
        scatter(attention, trial, slots(pages_B, P, P + 1), *written)
        read = [torch.stack(gather(attention, trial, pages_B, P + 1))]
        if rows := rows_of(attention, trial, G):
            at_M = slots(pages_B, P, P + 1, rows.step)
            read.append(torch.stack((rows.k_GTD[:, at_M], rows.v_GTD[:, at_M])))
        if all(torch.equal(one, written) for one in read):
            return
    raise PlanError(
        f"{problem}: choose --attention-backend {' or '.join(BACKENDS)}, or plan without a codec"
    )
