"""Triton kernels of the codecs: the same bytes as the torch path, in one pass on a GPU.

The torch path of ``kv/codecs`` is the reference: every step of a kernel is the same correctly
rounded operation in the same order, never a fused one, so that bytes and results are equal to the
bit. A codec's kernels are the module here of its name. A module has

- ``takes(codec, tokens, width)``: whether it codes heads of a shape; the torch path codes others;
- ``encode(codec, k_LTD, v_LTD, kept_LM)``: the wire bytes of all pairs, or of those at ``kept_LM``
  of each head (int32 or int64, any strides), which are never copied in between;
- ``decode(codec, data, heads, tokens, width, dtype)``: keys and values, and int32 ``[1]`` on the
  GPU that is not 0 where the bytes hold what ``encode`` cannot have made. The raw code needs none.

The module of a codec of fixed length codes many layers in one launch, too:

- ``encode_layers(codec, kv, kept_YLM, room_YS)``: from caches into a row of room for each layer;
- ``decode_layers(codec, data_YS, kv, kept_YLM)``: from such rows into caches, and ``broken`` as of
  ``decode``. Both need :func:`alike`.

Which path codes a tensor is decided here and nowhere else. Triton is imported when first used.

Shapes: Y layers, L heads, T tokens of the cache, M of them kept, D head width, S bytes of room.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from pdtrim.errors import WireError

if TYPE_CHECKING:
    from pdtrim.kv.codecs.base import CodecBase

Way = Literal["triton", "torch"]

ALIGNED = 16
"""Bytes: memory that starts at a multiple of it is read and written by wide words."""

_forced: ContextVar[Way | None] = ContextVar("forced", default=None)
_unchecked: ContextVar[list[tuple[Tensor, str]] | None] = ContextVar("unchecked", default=None)


def kernels_of(codec: CodecBase, device: torch.device, tokens: int, width: int) -> Any:
    """A codec's kernels for heads of a shape on a device; None where the torch path codes them."""
    if codec.kernels is None or not uses_kernels(device):
        return None
    module = import_module(f"{__name__}.{codec.kernels}")
    return module if module.takes(codec, tokens, width) else None


def uses_kernels(device: torch.device) -> bool:
    """Whether Triton works on a device's memory: on a GPU, unless :func:`use` says otherwise."""
    way = _forced.get() or ("triton" if device.type == "cuda" and _installed() else "torch")
    return way == "triton"


def alike(kv: Sequence[tuple[Tensor, Tensor]], data_YS: Tensor) -> bool:
    """Whether a launch can reach the pairs ``[L, T, D]`` of all layers from the first layer's.

    That is so in caches of one shape, whole words of ``ALIGNED`` bytes from one another, in which a
    token's channels lie together, with rows of data that begin with such words.
    """
    shapes = {(x.shape, x.stride(), x.dtype, x.data_ptr() % ALIGNED) for x, _ in kv}
    shapes_v = {(x.shape, x.stride(), x.dtype, x.data_ptr() % ALIGNED) for _, x in kv}
    together = all(x.stride(2) == 1 for x in kv[0])
    rows = data_YS.data_ptr() % ALIGNED == 0 and data_YS.stride(0) % ALIGNED == 0
    return len(shapes) == len(shapes_v) == 1 and together and rows


@contextmanager
def use(way: Way) -> Iterator[None]:
    """Code on one path only, whatever the device; on a CPU Triton needs ``TRITON_INTERPRET=1``."""
    token = _forced.set(way)
    try:
        yield
    finally:
        _forced.reset(token)


def refuse(broken: Tensor, message: str) -> None:
    """Raise WireError if a GPU found bytes that no encoder made; within :func:`together`, later."""
    unchecked = _unchecked.get()
    if unchecked is not None:
        unchecked.append((broken, message))
    elif broken.item():
        raise WireError(message)


@contextmanager
def together() -> Iterator[None]:
    """Wait once, at the end, for what a GPU finds in all bytes that are decoded here.

    Nothing of it may be used before. The current stream must be the one that decodes.

    Raises:
        WireError: as soon as the torch path sees it, or at the end.
    """
    unchecked: list[tuple[Tensor, str]] = []
    token = _unchecked.set(unchecked)
    try:
        yield
    finally:
        _unchecked.reset(token)
    if unchecked:
        flags = torch.cat([broken for broken, _ in unchecked]).tolist()
        for flag, (_, message) in zip(flags, unchecked, strict=True):
            if flag:
                raise WireError(message)


@cache
def _installed() -> bool:
    return find_spec("triton") is not None
