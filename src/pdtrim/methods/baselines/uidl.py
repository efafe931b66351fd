"""``uidl``: the run of blocks that turns the stream least (arXiv 2403.17887).

"The Unreasonable Ineffectiveness of the Deeper Layers". With x_l the stream that enters block l,
x_L the last block's output before the final norm, at the last token of a text, and n blocks to go::

    d_n(l) = arccos( <x_l, x_{l+n}> / (|x_l| |x_{l+n}|) ) / pi,     l* = argmin_l E_X[ d_n(l) ]

Blocks l* to l* + n - 1 go; asked for a share of the parameters, n is the least that saves it. The
paper takes texts of C4 and then heals with QLoRA; the simple rule of the paper (the deepest n but
the last) is not this method. Different here: the text is the user's and cut, so the last token is
that of a sequence and never padding; nothing is healed. Every l is allowed, the run that ends with
the last block too.

In mode ``subset`` prefill loses the run of its own length inside decode's that turns the stream
least. In mode ``projected`` each stage reads the last of its own tokens.

Shapes: B sequences, E hidden width, L layers, S = L - n + 1 places of a run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pdtrim.finite import finite
from pdtrim.methods.baselines.base import Baseline, Chosen, PaperCalibration
from pdtrim.methods.baselines.orders import apply_orders
from pdtrim.methods.baselines.residuals import dense_cost, read_residuals
from pdtrim.methods.problem import Problem
from pdtrim.plan import Stage
from pdtrim.search.goal import Goal


def angular_distance(flows: Sequence[Tensor], span: int) -> Tensor:
    """Angle over pi, 0 to 1, across every run of ``span`` blocks: ``[B, S]``.

    Args:
        flows: L + 1 streams ``[B, E]`` of one token, the last one before the final norm.
    """
    columns = [
        F.cosine_similarity(before.float(), after.float(), dim=-1).clamp(-1, 1).arccos() / math.pi
        for before, after in zip(flows, flows[span:], strict=False)
    ]
    return torch.stack(columns, dim=1)


@dataclass(frozen=True, kw_only=True)
class UIDL(Baseline):
    """The method has no settings."""

    name = "uidl"
    paper_calibration = PaperCalibration(source="C4 validation", sequences=10_000)

    def choose(self, problem: Problem) -> Chosen:
        """See the module's docstring."""
        goal, cost = problem.goal, dense_cost(problem)
        ends = read_residuals(problem, "angular distance", lambda x: [f[:, -1].clone() for f in x])
        last = {
            stage: [torch.cat(x) for x in zip(*parts, strict=True)] for stage, parts in ends.items()
        }
        everywhere = range(problem.model.num_layers)
        decode = best_run(last["decode"], goal, "decode", everywhere)
        own = "prefill" in last  # else prefill's run lies inside decode's
        flows, within = (last["prefill"], everywhere) if own else (last["decode"], decode)
        prefill = best_run(flows, goal, "prefill", within)
        orders: dict[Stage, range] = {"decode": decode, "prefill": prefill}
        return Chosen(state=apply_orders(problem, orders), block_tokens=cost)


def best_run(flows: Sequence[Tensor], goal: Goal, stage: Stage, within: range) -> range:
    """The run of least angle among the shortest within a range that save what the stage must.

    Empty if nothing is to be saved, or if no run saves it.
    """
    if not goal.needed(stage):
        return range(0)
    for span in range(max(goal.least(stage), 1), len(within) + 1):
        distance_S = angular_distance(flows, span).mean(0)
        distances = finite(distance_S, "the distance of a run of blocks").tolist()
        runs = [within[at : at + span] for at in range(len(within) - span + 1)]
        enough = [run for run in runs if not goal.lacking(run, stage)]  # a block may save nothing
        if enough:
            return min(enough, key=lambda run: distances[run.start])  # the first of equals
    return range(0)
