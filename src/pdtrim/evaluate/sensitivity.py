"""What each block is worth to each stage: the KL of losing it alone, and what recall loses.

Four ways to lose block i, everything else whole:

* ``prefill``: prompt tokens skip it, but its keys and values are computed for decode (projected).
* ``prefill, no KV``: prompt tokens skip it and no keys and values are made, so that decode's
  attention has to skip it too; decode keeps its MLP.
* ``decode``: new tokens skip it.
* ``unified``: both skip it, as a model pruned once for both stages would.

Shapes: B batch, L layers, W the four ways.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pdtrim.calibration.recall import answer_loss, recall_text
from pdtrim.calibration.teacher import Teacher
from pdtrim.finite import finite
from pdtrim.models.model import Model
from pdtrim.plan import Gates
from pdtrim.progress import Progress, silent
from pdtrim.search.objective import Loss
from pdtrim.stage.forward import Batch, Trimmed

ROWS = 8  # sequences run together


def _without_kv(count: int, layer: int) -> Gates:
    """Prefill skips the block and makes no keys and values for it."""
    gates = Gates.removing(count, prefill=[layer], decode=[layer], mode="subset")
    return gates.model_copy(update={"decode_mlp": (True,) * count})


WAYS: dict[str, Callable[[int, int], Gates]] = {
    "prefill": lambda count, layer: Gates.removing(count, prefill=[layer]),
    "prefill, no KV": _without_kv,
    "decode": lambda count, layer: Gates.removing(count, decode=[layer]),
    "unified": lambda count, layer: Gates.removing(count, prefill=[layer], decode=[layer]),
}


def sensitivity(model: Model, batch: Batch, *, progress: Progress = silent) -> Tensor:
    """Mean KL to the dense model, nats a token of the continuation, ``[W, L]`` as in ``WAYS``."""
    batch = batch.to(model.device)

    def loss_on(start: int) -> tuple[Batch, Loss]:
        part = batch[start : start + ROWS]
        teacher = Teacher.of(model, part)
        return part, lambda y_BCE: teacher.kl(model, y_BCE)

    kl_WL = _losses(model, len(batch), loss_on, progress)
    return finite(kl_WL, "the KL of losing a block")


def recall_sensitivity(
    model: Model, batch: Batch, *, progress: Progress = silent, seed: int = 0
) -> Tensor:
    """Mean NLL of answers above the dense model's (``calibration/recall.py``), likewise.

    Raises:
        CalibrationError: the text's sequences are too short for it.
    """
    rows = recall_text(model, batch, seed=seed)

    def loss_on(start: int) -> tuple[Batch, Loss]:
        part = rows[start : start + ROWS]
        dense_B = answer_loss(model, part, Trimmed.dense(model).last_stream(part.batch))
        return part.batch, lambda y_BCE: part.lost(answer_loss(model, part, y_BCE), dense_B)

    recall_WL = _losses(model, len(rows), loss_on, progress)
    return finite(recall_WL, "the recall of losing a block")


@torch.inference_mode()
def _losses(
    model: Model,
    sequences: int,
    loss_on: Callable[[int], tuple[Batch, Loss]],
    progress: Progress,
) -> Tensor:
    """Mean loss of losing each block in each way, ``[W, L]``, float64.

    Args:
        loss_on: what is run from a sequence on, ``ROWS`` of them, and its loss.
    """
    count = model.num_layers
    dense = Trimmed.dense(model)
    total_WL = torch.zeros(len(WAYS), count, dtype=torch.float64)
    with progress("measuring blocks", total_WL.numel() * sequences) as advance:
        for begin in range(0, sequences, ROWS):
            part, loss = loss_on(begin)
            whole = dense.streams(part)
            for way, gates_of in enumerate(WAYS.values()):
                for layer in range(count):
                    gates = gates_of(count, layer)
                    # the last block of prefill is dead work in the dense model already
                    first = min(layer, gates.last_read)
                    trace = replace(dense, gates=gates).streams(part, resume=whole, start=first)
                    loss_B = loss(trace[-1][1])
                    total_WL[way, layer] += float(loss_B.double().sum())
                    advance(len(loss_B))
    return total_WL / sequences
