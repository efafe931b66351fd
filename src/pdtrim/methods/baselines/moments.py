"""Moments of the inputs of a block's output projections, over all tokens of a text.

Shapes: F input channels of a projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pdtrim.models.block import OUTPUTS, Block
from pdtrim.models.hooks import before_each


class Moments:
    """Sums over the tokens that a projection has read, in float64: ``[F]`` each."""

    def __init__(self) -> None:
        self.count = 0
        self.sum_F: Tensor | float = 0.0
        self.squares_F: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        """Count tokens ``[..., F]`` in."""
        x_NF = x.detach().flatten(0, -2).double()
        self.count += len(x_NF)
        self.sum_F = self.sum_F + x_NF.sum(0)
        self.squares_F = self.squares_F + x_NF.square().sum(0)

    @property
    def mean_F(self) -> Tensor:
        """Mean of each channel."""
        assert self.count
        return torch.as_tensor(self.sum_F / self.count)

    @property
    def variance_F(self) -> Tensor:
        """Mean squared distance from the mean."""
        return (torch.as_tensor(self.squares_F / self.count) - self.mean_F.square()).clamp(min=0)

    @property
    def norm_F(self) -> Tensor:
        """Length of each channel's vector of all tokens."""
        return torch.as_tensor(self.squares_F).sqrt()


@contextmanager
def watched(block: Block) -> Iterator[tuple[Moments, Moments]]:
    """Inside, what the block's attention output and MLP down projections read is counted."""
    moments = Moments(), Moments()
    projections = [block.matrix(made) for made in OUTPUTS]
    with before_each(projections, lambda number, x, options: moments[number].add(x)):
        yield moments
