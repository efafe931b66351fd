"""bf16 on a CPU without instructions for it: products are made in fp32 and rounded once.

Such CPUs are told to emulate the instructions, at a fifth of fp32's speed (29 against 156 GFLOP/s
on one AVX-512 core, torch 2.13). The instructions sum in fp32 and round the sum to bf16, and so
does what is done here: both differ from each other by the order of a sum's terms alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

ROWS = 16
"""From so many rows on, a product saves more than the copy of the weights to fp32 costs."""

KEPT_BYTES = 2**30
"""Of copies in fp32, which are kept for the next product; what they do not hold is copied anew."""

INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # x86's, and ARM's


@cache
def cpu_lacks_bf16() -> bool:
    """Whether this CPU is known to have no instructions for products of bf16."""
    known = getattr(torch.cpu, "get_capabilities", None)  # not in every torch
    return known is not None and not any(known().get(name) for name in INSTRUCTIONS)


def emulated(tensor: Tensor) -> bool:
    """Whether products of a tensor would be emulated."""
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and cpu_lacks_bf16()


class Linear(nn.Linear):
    """A projection that is quick on every CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """See ``torch.nn.Linear``."""
        if _pays(input):
            return _product(input, _kept(self.weight), self.bias)
        return F.linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``torch.nn.functional.linear``, in fp32 where bf16 would be emulated."""
    return _product(x, weight.float(), None) if _pays(x) else F.linear(x, weight)


def _pays(x: Tensor) -> bool:
    return emulated(x) and x.shape[:-1].numel() >= ROWS


def _product(x: Tensor, wide: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.float(), wide, None if bias is None else bias.float()).to(x.dtype)


_copies: Any = WeakTensorKeyDictionary()
"""By weight, what it was copied from (its version and its place) and the copy in fp32."""


def _kept(weight: Tensor) -> Tensor:
    """A weight in fp32, copied once for as long as it stays what it is."""
    if weight.is_inference() or (weight.requires_grad and torch.is_grad_enabled()):
        return weight.float()
    state = weight._version, weight.data_ptr()
    made, copy = _copies.get(weight, (None, None))
    if made != state:
        with torch.inference_mode(False):  # or no gradient could go through it later
            copy = weight.detach().float()
        held = sum(other.nbytes for key, (_, other) in _copies.items() if key is not weight)
        if held + copy.nbytes <= KEPT_BYTES:
            _copies[weight] = state, copy
    return copy


def quicken(network: nn.Module) -> None:
    """Let a network's projections be :class:`Linear`; weights, names and hooks stay."""
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
