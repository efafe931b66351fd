"""What a plan must know of the machine that it is made on, to choose a code for a link.

Shapes: N prompt tokens, L layers.
"""

from __future__ import annotations

import statistics
from functools import partial

import torch

from pdtrim.bench.codec import codec_speeds
from pdtrim.bench.lanes import Lane, timed_rounds
from pdtrim.kvfit.link import Machine
from pdtrim.models.model import Model
from pdtrim.plan import Gates
from pdtrim.stage.generate import run_prefill

REPEATS = 3


def measure_machine(model: Model, tokens: int) -> Machine:
    """Speeds of the codecs on a layer of the model's cache, and of its prefill of so many tokens.

    Raises:
        PdtrimError: fewer than one token.
    """
    speeds = codec_speeds(
        heads=model.num_kv_heads,
        tokens=tokens,
        width=model.head_dim,
        dtype=model.dtype_name,
        device=model.device,
    )
    return Machine(codecs=speeds, layer_s=_prefill_s(model, tokens) / model.num_layers)


@torch.inference_mode()
def _prefill_s(model: Model, tokens: int) -> float:
    """Median seconds of a dense prefill, behind one that warms up."""
    ids_1N = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
    run = partial(run_prefill, model, ids_1N, Gates.dense(model.num_layers))
    return statistics.median(timed_rounds({"": run}, Lane(model.device), REPEATS)[""])
