"""Where prefill's projections begin to train: at the dense model's keys and values.

The squares of what K and V of each skipped block miss have their least in closed form, which is the
repair's fit (``repair/kv.py``), here on the text that trains. It begins from the dense model's
projections, whatever the plan has there.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch import Tensor

from pdtrim.distill.trainable import keys_and_values
from pdtrim.models.model import Model
from pdtrim.models.swap import Weights
from pdtrim.repair.apply import repair
from pdtrim.stage.forward import Batch, Trimmed
from pdtrim.stage.swap import swap_pair


def fitted_kv(
    dense: Model, trimmed: Trimmed, batch: Batch, layers: Collection[int]
) -> dict[str, Tensor]:
    """Projections of the skipped blocks among ``layers``, by ``layer.name``."""
    skipped = [i for i in layers if trimmed.gates.prefill_attention[i] == "kv"]
    plain: dict[int, Weights] = {}
    for i in skipped:
        block = dense.block(i)
        names = [f"{name}.weight" for name in keys_and_values(block)]
        plain[i] = {name: block.module.get_parameter(name) for name in names}
    begun = replace(trimmed, pair=swap_pair(trimmed.pair, {"prefill": plain}))
    made = repair(dense, begun, batch, "kv", stages=("prefill",))["prefill"]
    return {f"{i}.{name}": made[i][name] for i in skipped for name in plain[i]}
