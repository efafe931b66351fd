"""What the launches of all codecs share.

Shapes: Y layers, L heads, T tokens of the cache, M of them kept, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from pdtrim.kv.kernels import ALIGNED

Pairs = Sequence[tuple[Tensor, Tensor]]
"""Keys and values ``[L, T, D]`` of each layer."""
TILE = 8192
"""Elements a program holds in registers: 64 tokens of 128 channels."""


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever its arguments' device is."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def tokens_of(width: int) -> int:
    """Tokens a tile."""
    return max(16, TILE // triton.next_power_of_2(width))


def threads(elements: int) -> dict[str, int]:
    """Launch options of a program of so many elements: 32 a thread, two such programs a core."""
    warps = min(16, max(4, elements // 1024))
    return {"num_warps": warps, "maxnreg": 1024 // warps}


def rows(x_LTD: Tensor) -> Tensor:
    """The cache itself where a token's channels lie together, else a copy."""
    return x_LTD if x_LTD.stride(2) == 1 or x_LTD.shape[2] == 1 else x_LTD.contiguous()


def aligned(data: Tensor) -> Tensor:
    """The bytes themselves where they start at an aligned address, else a copy that does."""
    return data.clone() if data.data_ptr() % ALIGNED else data


def source(
    kv: Pairs, kept_YLM: Tensor | None
) -> tuple[tuple[Tensor, ...], tuple[int, ...], dict[str, bool]]:
    """What kernels are told of where pairs lie: pointers, strides and constants.

    The pointers are the first layer's, to anything where all tokens are kept or there is one layer.
    """
    k_LTD, v_LTD = kv[0]
    kept, at = (k_LTD, (0, 0, 0)) if kept_YLM is None else (kept_YLM, kept_YLM.stride())
    pointers = (k_LTD, v_LTD, kept, apart(kv) if len(kv) > 1 else k_LTD)
    strides = (*k_LTD.stride()[:2], *v_LTD.stride()[:2], *at[1:], at[0])
    return pointers, strides, {"KEPT": kept_YLM is not None, "MANY": len(kv) > 1}


def apart(kv: Pairs) -> Tensor:
    """int64 ``[2, Y]``: how many words of ``ALIGNED`` bytes after the first layer's each is."""
    first = [x.data_ptr() for x in kv[0]]
    steps = [[(pair[i].data_ptr() - first[i]) // ALIGNED for pair in kv] for i in range(2)]
    device = kv[0][0].device
    made = torch.tensor(
        steps, pin_memory=device.type == "cuda"
    )  # else the copy would be waited for
    return made.to(device, non_blocking=True)


def shape_of(kv: Pairs, kept_YLM: Tensor | None) -> tuple[int, int, int, int]:
    """Layers, heads, tokens that travel, width."""
    L, T, D = kv[0][0].shape
    return len(kv), L, T if kept_YLM is None else kept_YLM.shape[2], D


def encoded(
    encode_layers: Callable[..., None],
    codec: Any,
    k_LTD: Tensor,
    v_LTD: Tensor,
    kept_LM: Tensor | None,
) -> Tensor:
    """One layer's bytes, by what encodes many of a codec of fixed length."""
    kv, kept_YLM = [(rows(k_LTD), rows(v_LTD))], None if kept_LM is None else kept_LM[None]
    size = codec.nbytes(*shape_of(kv, kept_YLM)[1:], k_LTD.dtype)
    data = torch.empty(size, dtype=torch.uint8, device=k_LTD.device)
    encode_layers(codec, kv, kept_YLM, data[None])
    return data


def decoded(
    decode_layers: Callable[..., Tensor],
    codec: Any,
    data: Tensor,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer's keys and values ``[L, M, D]`` and ``broken``, by what decodes many."""
    k_LMD, v_LMD = torch.empty(2, *shape, dtype=dtype, device=data.device)
    return k_LMD, v_LMD, decode_layers(codec, aligned(data)[None], [(k_LMD, v_LMD)], None)
