"""What each way of handing over sends of a cache, layer by layer.

Shapes: L layers, G KV heads, N prompt tokens, M of them kept, D head width; 2 for K and V.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pdtrim.bench.codec import sample
from pdtrim.errors import PlanError
from pdtrim.kv.codecs import CodecBase
from pdtrim.kv.selectors import SELECTORS, Full, SelectorBase, StaticSelector
from pdtrim.kv.view import LayerView
from pdtrim.kvfit.policy import parse_policy
from pdtrim.kvfit.request import KVRequest

PAPER_FIRST, PAPER_LAST, PAPER_LAYERS = 4, 76, 0.8125
"""The paper's 4.01 to 0.82 Gbit (arXiv 2509.04467): 3,824 tokens of LLaMA-3.1-8B, of which 26 of
32 layers send 80."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """L, G, N and D of a cache."""

    layers: int
    heads: int
    tokens: int
    width: int

    def raw_bytes(self, dtype: torch.dtype) -> int:
        """Of the whole cache."""
        return 2 * self.layers * self.heads * self.tokens * self.width * dtype.itemsize


def random_cache(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[2, L, G, N, D]``, a few key channels loud as in real keys; always the same."""
    kv = sample(sizes.layers * sizes.heads, sizes.tokens, sizes.width).to(device, dtype)
    return kv.view(2, sizes.layers, sizes.heads, sizes.tokens, sizes.width)


@dataclass(frozen=True, kw_only=True)
class LayerSent:
    """How one layer travels.

    Attributes:
        kept_GM: which tokens; None is all.
        tokens: M.
    """

    codec: CodecBase
    kept_GM: Tensor | None
    tokens: int

    def encode(self, k_GND: Tensor, v_GND: Tensor) -> Tensor:
        """The bytes that travel."""
        if self.kept_GM is None:
            return self.codec.encode(k_GND, v_GND)
        return self.codec.encode_kept(k_GND, v_GND, self.kept_GM)

    def decode(self, data: Tensor, sizes: Sizes, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values, each ``[G, M, D]``."""
        return self.codec.decode(data, sizes.heads, self.tokens, sizes.width, dtype)


def paper_rule(sizes: Sizes) -> str:
    """The paper's rule as a KV policy."""
    layers = round(PAPER_LAYERS * sizes.layers)
    return f"first_last:first={PAPER_FIRST},last={PAPER_LAST},layers={layers}"


def layers_sent(policy: str, sizes: Sizes, device: torch.device) -> list[LayerSent]:
    """How each layer travels under a KV policy that needs no prompt.

    Layers that a selector does not apply to are spread evenly, because there are no weights to
    choose them by.

    Raises:
        PlanError: the text is no policy, or one that must see a prompt or a model.
    """
    asked = parse_policy(policy)
    if not isinstance(asked, KVRequest) or asked.layers == "auto":
        raise _needs_text(policy)
    asked.codec.check_width(sizes.width)
    count = sizes.layers if asked.layers == "all" else asked.layers
    assert isinstance(count, int)
    if count > sizes.layers:
        raise PlanError(f"KV policy: layers={count}, but the shape has {sizes.layers}")
    selectors = SELECTORS[asked.selector].fit(_Unseen(policy, sizes), asked.options, asked.share)
    whole = sizes.layers - count
    spread = {(2 * i + 1) * sizes.layers // (2 * whole) for i in range(whole)}
    return [
        _layer(policy, Full() if layer in spread else selector, asked.codec, sizes, device)
        for layer, selector in enumerate(selectors)
    ]


def _layer(
    policy: str, selector: SelectorBase, codec: CodecBase, sizes: Sizes, device: torch.device
) -> LayerSent:
    if isinstance(selector, Full):
        return LayerSent(codec=codec, kept_GM=None, tokens=sizes.tokens)
    if not isinstance(selector, StaticSelector):
        raise _needs_text(policy)
    keep_GN = selector.static_keep(sizes.heads, sizes.tokens)
    if not bool((keep_GN == keep_GN[:1]).all()):
        raise _needs_text(policy)
    kept_M = keep_GN[0].nonzero()[:, 0].to(device, torch.int32)
    kept_GM = kept_M.expand(sizes.heads, -1).contiguous()
    return LayerSent(codec=codec, kept_GM=kept_GM, tokens=kept_M.numel())


class _Unseen:
    """What a fit may ask of a shape: its sizes, and nothing of a text."""

    def __init__(self, policy: str, sizes: Sizes) -> None:
        self.num_layers, self.num_kv_heads, self.tokens = sizes.layers, sizes.heads, sizes.tokens
        self._policy = policy

    def view(self, layer: int) -> LayerView:
        """There is none."""
        raise _needs_text(self._policy)

    def later_queries(self, layer: int) -> Tensor:
        """There are none."""
        raise _needs_text(self._policy)

    def concentration(self, rule: StaticSelector) -> Tensor:
        """Nothing attends."""
        raise _needs_text(self._policy)


def _needs_text(policy: str) -> PlanError:
    return PlanError(
        f"KV policy '{policy}' must see a prompt, and a shape has none: time full, or first_last"
        " with layers=all or a number, each with any codec"
    )


def paged(kv_2LGND: Tensor, page: int) -> Tensor:
    """The same cache as a serving engine's pages, ``[L, pages, 2, page, G, D]``; the last padded.

    Every page of a layer is one run of memory.
    """
    L, G, N, D = kv_2LGND.shape[1:]
    pages = -(-N // page)
    padded = torch.nn.functional.pad(kv_2LGND, (0, 0, 0, pages * page - N))
    return padded.view(2, L, G, pages, page, D).permute(1, 3, 0, 4, 2, 5).contiguous()
