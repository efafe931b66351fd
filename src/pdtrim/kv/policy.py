"""A plan's KV policy at work: cut the prompt's keys and values to what travels.

The simulator and the real prefill process both call :func:`hand_over`, so they cannot disagree.
Dropped tokens are gone, never zeroed: a zero key would still take softmax mass.

Shapes: B batch, G KV heads, N prompt tokens handed over, M of them kept, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pdtrim.kv.selectors import Runs, kept_runs
from pdtrim.plan import LayerKV, PrunePlan


@dataclass(frozen=True, kw_only=True)
class HandoverPolicy:
    """One rule a layer and the page size they round to."""

    rules: tuple[LayerKV, ...]
    block_size: int = 1

    @classmethod
    def of(cls, plan: PrunePlan) -> HandoverPolicy:
        """The policy of a plan."""
        return cls(rules=plan.kv, block_size=plan.block_size)

    @classmethod
    def full(cls, num_layers: int) -> HandoverPolicy:
        """Everything travels."""
        return cls(rules=(LayerKV(),) * num_layers)

    def runs(self, layer: int, tokens: int) -> Runs:
        """Kept runs of one layer for ``tokens`` handed over."""
        return kept_runs(self.rules[layer], tokens, block_size=self.block_size)

    def kept(self, layer: int, tokens: int) -> int:
        """How many tokens of the layer travel."""
        return sum(stop - start for start, stop in self.runs(layer, tokens))


def take(x_BGND: Tensor, runs: Runs, *, dim: int = 2) -> Tensor:
    """The kept tokens along ``dim``, in order."""
    if len(runs) == 1:
        return x_BGND.narrow(dim, runs[0][0], runs[0][1] - runs[0][0])
    if not runs:
        return x_BGND.narrow(dim, 0, 0)
    return torch.cat([x_BGND.narrow(dim, a, b - a) for a, b in runs], dim=dim)


def hand_over(
    policy: HandoverPolicy, layer: int, k_BGND: Tensor, v_BGND: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What decode receives of a layer: keys, values ``[B, G, M, D]`` and positions ``[M]``."""
    tokens = k_BGND.shape[2]
    runs = policy.runs(layer, tokens)
    positions_N = torch.arange(tokens, device=k_BGND.device)
    return take(k_BGND, runs), take(v_BGND, runs), take(positions_N, runs, dim=0)
