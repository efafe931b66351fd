"""The pair of a plan: the dense model's blocks narrowed and replaced as each stage runs them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pdtrim.errors import PlanError
from pdtrim.models.model import Model
from pdtrim.models.narrow import narrow_stage
from pdtrim.models.replace import Weights, swap_blocks
from pdtrim.models.replacements import load_blocks
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


def pair_of(plan: PrunePlan, model: Model, folder: Path | None) -> Pair:
    """The dense model in both roles, with the plan's narrower and replaced blocks of each stage.

    Without replaced blocks, stages of equal widths are one model.

    Args:
        folder: the plan file's, which holds the replaced blocks; None if there are none.

    Raises:
        PlanError: a replaced block's file is missing or is not the plan's, or a width names a
            head or a neuron that the model does not have.
    """
    pair = _narrowed(plan, model)
    if not plan.replacements:
        return pair
    if folder is None:
        raise PlanError(
            f"the plan's replaced blocks are in files, such as '{plan.replacements[0].weights}':"
            " say in which folder"
        )
    return swap_pair(pair, load_blocks(plan, model, folder))


def _narrowed(plan: PrunePlan, model: Model) -> Pair:
    prefill = narrow_stage(model, plan, "prefill")
    if plan.widths is None or plan.widths.prefill == plan.widths.decode:
        return Pair.dense(prefill)
    return Pair(prefill=prefill, decode=narrow_stage(model, plan, "decode"))
