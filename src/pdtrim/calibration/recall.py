"""Prompts continued by pieces of themselves: text that only a cache which kept them can predict.

Web text seldom looks back more than a few sentences, so a KV policy that is fitted on it alone
forgets what a question could ask for. Copying needs every token of the prompt alike, with no task,
no template and no data beyond the calibration text. (A repeated random sequence is the usual probe
of induction heads: Olsson et al., 2209.11895.)

Shapes: B rows, P prompt tokens, C continuation tokens.
"""

from __future__ import annotations

import torch

from pdtrim.stage.forward import Batch

PIECE = 32  # tokens; the first few only tell where it comes from


def with_recall(batch: Batch, *, seed: int = 0) -> Batch:
    """The batch, and below it its prompts again, each continued by random pieces of itself."""
    draw = torch.Generator().manual_seed(seed)
    P, C = batch.prompt_BP.shape[1], batch.continuation_BC.shape[1]
    piece = min(PIECE, P)
    rows = []
    for prompt_P in batch.prompt_BP:
        starts = torch.randint(0, P - piece + 1, (-(-C // piece),), generator=draw).tolist()
        rows.append(torch.cat([prompt_P[start : start + piece] for start in starts])[:C])
    copied = Batch(prompt_BP=batch.prompt_BP, continuation_BC=torch.stack(rows))
    return Batch.join([batch, copied])
