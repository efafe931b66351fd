"""bf16 on a CPU without instructions for it: products are made in fp32 and rounded once.

Such CPUs are told to emulate the instructions, at a fifth of fp32's speed (29 against 156 GFLOP/s
on one AVX-512 core, torch 2.13). The instructions sum in fp32 and round the sum to bf16, and so
does what is done here: both differ from each other by the order of a sum's terms alone.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROWS = 16
"""From so many rows on, a product saves more than the copy of the weights to fp32 costs."""

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
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``, in fp32 where bf16 would be emulated."""
    if not emulated(x) or x.shape[:-1].numel() < ROWS:
        return F.linear(x, weight, bias)
    wide = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return wide.to(x.dtype)


def quicken(network: nn.Module) -> None:
    """Let a network's projections be :class:`Linear`; weights, names and hooks stay."""
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
