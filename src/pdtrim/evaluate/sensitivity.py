"""What each block is worth to each stage: the KL of losing it alone.

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

from pdtrim.calibration.teacher import Teacher
from pdtrim.finite import finite
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.models.model import Model
from pdtrim.plan import Gates
from pdtrim.progress import Progress, silent
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


@torch.inference_mode()
def sensitivity(
    model: Model,
    batch: Batch,
    *,
    policy: HandoverPolicy | None = None,
    progress: Progress = silent,
) -> Tensor:
    """Mean KL to the dense model, nats a continuation token, ``[W, L]`` in the order of ``WAYS``.

    Args:
        policy: KV policy under which blocks are lost; None is full.
    """
    batch, count = batch.to(model.device), model.num_layers
    policy = policy or HandoverPolicy.full(count)
    dense = replace(Trimmed.dense(model), policy=policy)
    total_WL = torch.zeros(len(WAYS), count, dtype=torch.float64)
    with progress("measuring blocks", total_WL.numel() * len(batch)) as advance:
        for start in range(0, len(batch), ROWS):
            part = batch[start : start + ROWS]
            teacher = Teacher.of(model, part)
            whole = dense.streams(part)
            for way, gates_of in enumerate(WAYS.values()):
                for layer in range(count):
                    gates = gates_of(count, layer)
                    # the last block of prefill is dead work in the dense model already
                    first = min(layer, gates.last_read)
                    trace = replace(dense, gates=gates).streams(part, resume=whole, start=first)
                    kl_B = teacher.kl(model, trace[-1][1])
                    total_WL[way, layer] += float(kl_B.double().sum())
                    advance(len(part))
    return finite(total_WL / len(batch), "the KL of losing a block")
