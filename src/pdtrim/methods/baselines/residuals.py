"""The streams of the dense model, for scores that need one pass and no pruned model.

Shapes: B sequences, N prompt tokens that prefill runs, C continuation tokens, T = N + C tokens,
E hidden width, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from pdtrim.errors import PlanError
from pdtrim.methods.baselines.orders import ranking_mode
from pdtrim.methods.problem import Problem
from pdtrim.models.block import Block
from pdtrim.models.model import Model
from pdtrim.plan import Gates, Stage
from pdtrim.search.objective import ROWS, BudgetSpent
from pdtrim.stage.cost import block_tokens
from pdtrim.stage.forward import Batch
from pdtrim.stage.step import prefill_block

T = TypeVar("T")


def ranked_tokens(problem: Problem) -> dict[Stage, slice]:
    """Positions that each stage's ranking reads: its own in mode ``projected``, else all.

    Raises:
        PlanError: prefill is to be ranked and has no token.
    """
    target = problem.target
    N = problem.text.search.prompt_BP.shape[1] - 1
    if ranking_mode(target) == "unified":
        return {"decode": slice(None)}
    if N == 0 and (target.prefill_remove or target.prefill_share):
        raise PlanError("prompts of 1 token leave prefill nothing to be ranked on: give longer")
    return {"decode": slice(N, None), "prefill": slice(N)} if N else {"decode": slice(None)}


def dense_cost(problem: Problem, passes: int = 1) -> int:
    """Block-tokens of passes of the dense model over the text.

    Raises:
        BudgetSpent: that is more than the target's budget.
    """
    batch, target = problem.text.search, problem.target
    B, P = batch.prompt_BP.shape
    C = batch.continuation_BC.shape[1]
    gates = Gates.dense(problem.model.num_layers)
    cost = passes * block_tokens(gates, sequences=B, prefill=P - 1, decode=C)
    if target.budget is not None and cost > target.budget:
        raise BudgetSpent
    return cost


def whole_blocks(model: Model, tokens: int) -> Callable[[Block, Tensor], Tensor]:
    """What runs a whole block on streams ``[B, T, E]`` of so many tokens, as an ordinary forward.

    The simulator's prefill does not serve here: it stops behind the last keys and values that
    decode reads, and so has no prompt tokens behind the last block.
    """
    rope = model.rope(torch.arange(tokens, device=model.device)[None])

    def run(block: Block, x_BTE: Tensor) -> Tensor:
        return prefill_block(block, x_BTE, rope, model.rope, attention="full", mlp=True)[0]

    return run


def dense_residuals(model: Model, batch: Batch) -> list[Tensor]:
    """Streams ``[B, T, E]`` that enter each layer, and the last one's output: L + 1 of them."""
    ids_BT = batch.ids_BT[:, :-1]
    run = whole_blocks(model, ids_BT.shape[1])
    flows = [model.embed(ids_BT)]
    for layer in range(model.num_layers):
        flows.append(run(model.block(layer), flows[-1]))
    return flows


def read_residuals(
    problem: Problem, what: str, read: Callable[[list[Tensor]], T]
) -> dict[Stage, list[T]]:
    """What is read of the dense streams on each stage's tokens, a few sequences at a time.

    Args:
        what: for the progress bar.
        read: takes L + 1 streams ``[B, T, E]``, cut to the tokens that the stage is ranked on.

    Raises:
        PlanError: as :func:`ranked_tokens`.
    """
    tokens, batch = ranked_tokens(problem), problem.batch
    found: dict[Stage, list[T]] = {stage: [] for stage in tokens}
    with problem.progress(what, len(batch)) as advance:
        for flows in each_residuals(problem.model, batch):
            for stage, span in tokens.items():
                found[stage].append(read([x_BTE[:, span] for x_BTE in flows]))
            advance(len(flows[0]))
    return found


@torch.inference_mode()
def each_residuals(model: Model, batch: Batch) -> Iterator[list[Tensor]]:
    """:func:`dense_residuals` of a few sequences at a time."""
    for part in batch.parts(ROWS):
        yield dense_residuals(model, part)
