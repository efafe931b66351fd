"""The dense model's blocks narrowed and replaced as each stage of a plan runs them."""

from __future__ import annotations

from collections.abc import Mapping

from pdtrim.models.model import Model
from pdtrim.models.narrow import narrow_stage
from pdtrim.models.swap import Weights, swap_blocks
from pdtrim.plan import PrunePlan, Stage
from pdtrim.stage.forward import Pair


def swap_pair(pair: Pair, blocks: Mapping[Stage, Mapping[int, Weights]]) -> Pair:
    """A pair with other weights in some blocks of each stage; a stage without any is shared.

    Args:
        pair: of whole models, as before export.
        blocks: by stage and dense layer index.

    Raises:
        ValueError: a parameter that the block does not have, or of another shape.
    """
    prefill, decode = blocks.get("prefill"), blocks.get("decode")
    return Pair(
        prefill=swap_blocks(pair.prefill, prefill) if prefill else pair.prefill,
        decode=swap_blocks(pair.decode, decode) if decode else pair.decode,
    )


def narrowed(plan: PrunePlan, model: Model) -> Pair:
    """The dense model in both roles, as narrow as the plan has each; equal stages are one model.

    Raises:
        PlanError: a width names a head or a neuron that the model does not have.
    """
    prefill = narrow_stage(model, plan, "prefill")
    if plan.widths is None or plan.widths.prefill == plan.widths.decode:
        return Pair.dense(prefill)
    return Pair(prefill=prefill, decode=narrow_stage(model, plan, "decode"))
