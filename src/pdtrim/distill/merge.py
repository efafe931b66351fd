"""Two neighbouring decode blocks become one, by local regression.

The block that stays at its slot learns to turn the stream that enters the first of the two into the
stream that leaves the second, as the dense model has them on continuation tokens. Its prompt KV is
what dense prefill makes at that slot: prefill's weights do not change, so the block must live with
the keys and values of the layer it stands at. Hence the choice of where to begin is a choice of
slot: each block begins as itself, on its own layer's KV.

LLM-Streamline (2403.19135) and XMerge (2609.02083) fit one block to several in the same way, with
one forward for prompt and continuation alike.

Shapes: B batch, N prefilled tokens, C continuation tokens, E hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pdtrim.distill.schedule import rows_of
from pdtrim.distill.student import DTYPES, Compute, Descent, Student, by_layer, frozen
from pdtrim.distill.trainable import running
from pdtrim.errors import PlanError
from pdtrim.finite import finite
from pdtrim.kv.policy import HandoverPolicy, hand_over
from pdtrim.models.model import Model
from pdtrim.models.swap import Weights
from pdtrim.plan import Gates
from pdtrim.progress import Progress, silent
from pdtrim.stage.forward import Batch, Trimmed, decode_stream
from pdtrim.stage.step import prefill_block

ROWS = 8  # sequences run together


@dataclass(frozen=True, kw_only=True)
class MergeConfig(Descent):
    """How a merged block is fitted; words as in ``DistillConfig``."""

    steps: int = 200
    learning_rate: float = 5e-4
    rows: int = 4
    seed: int = 0
    compute: Compute = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class Around:
    """The dense model around layers ``first`` and ``first + 1``, on some text.

    Attributes:
        entering: by layer of the two, the prompt's stream ``[B, N, E]``, whence the layer's KV.
        input_BCE, target_BCE: decode's stream before the first and behind the second.
    """

    batch: Batch
    first: int
    entering: dict[int, Tensor]
    input_BCE: Tensor
    target_BCE: Tensor

    @property
    def variance(self) -> float:
        """Mean square of the target about each channel's mean."""
        target_BCE = self.target_BCE.float()
        return float((target_BCE - target_BCE.mean((0, 1))).square().mean())

    def __getitem__(self, rows: list[int]) -> Around:
        return Around(
            batch=self.batch[rows],
            first=self.first,
            entering={layer: x_BNE[rows] for layer, x_BNE in self.entering.items()},
            input_BCE=self.input_BCE[rows],
            target_BCE=self.target_BCE[rows],
        )


@dataclass(frozen=True, kw_only=True)
class Merged:
    """One block for two.

    Attributes:
        layer: the slot it stands at; decode drops the other of the two.
        merged: the two layers.
        weights: in the model's type; for ``swap_blocks``.
        error_before, error_after: relative error on the text given, see ``relative_error``.
    """

    layer: int
    merged: tuple[int, int]
    weights: Weights
    error_before: float
    error_after: float


@torch.no_grad()
def observe(model: Model, batch: Batch, first: int) -> Around:
    """Run the dense model and record what a merge of ``first`` and the next block needs.

    Raises:
        PlanError: there are no two such blocks.
    """
    if not 0 <= first < model.num_layers - 1:
        raise PlanError(f"no blocks {first} and {first + 1} to merge in {model.num_layers} layers")
    batch = batch.to(model.device)
    dense = Trimmed.dense(model)
    columns: list[list[Tensor]] = [[], [], [], []]
    for part in batch.parts(ROWS):
        trace = dense.streams(part)
        (x0, y0), (x1, _), (_, y2) = trace[first : first + 3]
        for column, stream in zip(columns, (x0, x1, y0, y2), strict=True):
            column.append(stream)
    x0, x1, y0, y2 = (torch.cat(column) for column in columns)
    return Around(
        batch=batch, first=first, entering={first: x0, first + 1: x1}, input_BCE=y0, target_BCE=y2
    )


def block_output(dense: Model, decode: Model, seen: Around, layer: int) -> Tensor:
    """What decode's block at ``layer`` alone makes of the observed input, ``[B, C, E]``.

    Args:
        dense: gives the prompt's keys and values of that layer.
    """
    x_BNE = seen.entering[layer]
    at_N = torch.arange(x_BNE.shape[1], device=x_BNE.device)[None]
    with torch.no_grad():
        block, rope = dense.block(layer), dense.rope(at_N)
        _, view = prefill_block(block, x_BNE, rope, dense.rope, attention="kv", mlp=False)
        assert view is not None
        groups = hand_over(HandoverPolicy.full(dense.num_layers), layer, view)
    handed = [groups if i == layer else [] for i in range(dense.num_layers)]
    y_BCE = seen.input_BCE
    return decode_stream(decode, seen.batch, handed, y_BCE, start=layer, stop=layer + 1)


@torch.no_grad()
def relative_error(dense: Model, decode: Model, seen: Around, layer: int) -> float:
    """Mean squared error of the block at ``layer`` over the target's variance."""
    total = 0.0
    for start in range(0, len(seen.batch), ROWS):
        part = seen[list(range(start, min(start + ROWS, len(seen.batch))))]
        out_BCE = block_output(dense, decode, part, layer)
        total += float((out_BCE.float() - part.target_BCE.float()).square().sum())
    return total / seen.target_BCE.numel() / seen.variance


def better_slot(dense: Model, seen: Around) -> tuple[int, float]:
    """Which of the two dense blocks alone comes nearer to both, and its relative error."""
    errors = {layer: relative_error(dense, dense, seen, layer) for layer in seen.entering}
    finite(torch.tensor(list(errors.values())), "the error of a merged block")
    layer = min(errors, key=errors.__getitem__)
    return layer, errors[layer]


def merge(
    model: Model, batch: Batch, first: int, config: MergeConfig, *, progress: Progress = silent
) -> Merged:
    """Fit one block to ``first`` and the next; the same seed gives the same weights on a CPU.

    The weights that come back are never worse on the text than where they began.

    Raises:
        PlanError: there are no two such blocks.
    """
    dense = frozen(model, DTYPES[config.compute])
    seen = observe(dense, batch, first)
    layer, before = better_slot(dense, seen)
    gates = Gates.dense(model.num_layers)
    student = Student(model, dense, running(model, gates, "decode", [layer]), {}, config)
    untrained = student.copy_weights(model.dtype)
    variance = seen.variance
    with progress(f"merging blocks {first} and {first + 1}", config.steps) as advance:
        for step in range(config.steps):
            part = seen[rows_of(step, config.rows, len(seen.batch), config.seed)]
            with torch.enable_grad():
                out_BCE = block_output(dense, student.model, part, layer)
                loss = (out_BCE.float() - part.target_BCE.float()).square().mean() / variance
            loss.backward()
            student.collect()
            student.step(step)
            advance(1)
    after = relative_error(dense, student.model, seen, layer)
    worse = not after < before
    weights = untrained if worse else student.copy_weights(model.dtype)
    return Merged(
        layer=layer,
        merged=(first, first + 1),
        weights=by_layer(weights)[layer],
        error_before=before,
        error_after=before if worse else after,
    )
