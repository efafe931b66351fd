"""Logit distillation: train decode's kept blocks until the pair speaks like the dense model.

The loss is KL(dense || pair) on continuation tokens under prefill/decode inference with the plan's
gates and KV policy: the simulator itself (``stage/forward.py``), with gradients on decode's side.
Prefill's weights stay as they are, so the KV that travels does too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pdtrim.distill.checkpoint import Point, Position, load, save
from pdtrim.distill.job import DistillConfig, Job
from pdtrim.distill.loss import backward_kl, dense_stream, kl_of
from pdtrim.distill.schedule import rows_of
from pdtrim.distill.student import DTYPES, Student, by_layer, frozen
from pdtrim.distill.trainable import trainable_layers
from pdtrim.finite import finite
from pdtrim.models.model import Model
from pdtrim.models.swap import Weights
from pdtrim.progress import Advance, Progress, silent
from pdtrim.stage.forward import Batch, Pair, Trimmed


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """The blocks with the lowest held-out KL, the start included.

    Attributes:
        blocks: by layer, in the model's type; for ``swap_blocks``.
        held_out_before, held_out_after: KL to the dense model, nats a token.
    """

    blocks: dict[int, Weights]
    history: tuple[Point, ...]
    held_out_before: float
    held_out_after: float


def distill(
    model: Model,
    trimmed: Trimmed,
    data: Batch,
    held_out: Batch,
    config: DistillConfig,
    *,
    start: Mapping[int, Weights] | None = None,
    checkpoint: Path | None = None,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda text: None,
) -> Distilled:
    """Train decode's blocks; the same seed gives the same weights on a CPU.

    Args:
        model: the dense model: the teacher, and where decode's blocks start.
        trimmed: what runs; its decode model is the dense one, whose blocks ``start`` replaces.
        held_out: text that chooses the best weights and stops the training; not in ``data``.
        start: merged or repaired blocks that decode runs in place of the model's.
        checkpoint: a file; if it is there the run goes on from it, to the same weights.
        say: told each evaluation.

    Raises:
        PlanError: nothing to train, no rows, or the checkpoint is not of this run.
        PdtrimError: the loss or a gradient is NaN or infinite: the training ends there.
    """
    job = Job(
        model=model,
        trimmed=trimmed,
        data=data.to(model.device),
        held_out=held_out.to(model.device),
        config=config,
        start=start or {},
    )
    run = _Run(job, checkpoint, say)
    with progress("distilling", config.steps) as advance:
        run.train(advance)
    return run.result()


class _Run:
    """A training run, fresh or resumed."""

    def __init__(self, job: Job, checkpoint: Path | None, say: Callable[[str], None]) -> None:
        self._began = time.monotonic()
        self.job, self.config, self.say = job, job.config, say
        gates, prefill = job.trimmed.gates, job.trimmed.pair.prefill
        layers = trainable_layers(job.config.which, gates, job.start)
        self.dense = frozen(job.model, DTYPES[job.config.compute])
        self.student = Student(job.model, self.dense, gates, layers, job.start, job.config.descent)
        pair = Pair(
            prefill=self.dense if prefill is job.model else frozen(prefill, self.dense.dtype),
            decode=self.student.model,
        )
        self.trained = replace(job.trimmed, pair=pair)
        self.checkpoint = checkpoint
        self.settings = {} if checkpoint is None else job.settings()
        self.position = Position(step=0, seconds=0.0, losses=[], history=[])
        self.best: dict[str, Tensor] = {}
        if checkpoint is not None and checkpoint.exists():
            self._resume(checkpoint)
        self._saved = time.monotonic()
        self.held_out_dense = self._dense_streams(job.held_out)
        self.data_dense = self._dense_streams(job.data) if job.config.keep_dense else None

    def train(self, advance: Advance) -> None:
        """Train to the end, from wherever the run stands."""
        position, config = self.position, self.config
        advance(position.step)
        if not position.history:
            self._evaluate()
        while not self._finished():
            self._step()
            if position.step % config.evaluate_every == 0:
                self._evaluate()
            if time.monotonic() - self._saved >= config.checkpoint_seconds:
                self._save()
            advance(1)
        if position.history[-1].step != position.step:
            self._evaluate()
        self._save()

    def result(self) -> Distilled:
        """The best weights so far."""
        history = self.position.history
        blocks = {
            layer: {name: tensor.to(self.job.model.dtype) for name, tensor in weights.items()}
            for layer, weights in self.job.start.items()
        }
        for layer, weights in by_layer(self.best).items():
            blocks[layer] = {**blocks.get(layer, {}), **weights}
        return Distilled(
            blocks=blocks,
            history=tuple(history),
            held_out_before=history[0].held_out_kl,
            held_out_after=history[_best(history)].held_out_kl,
        )

    @property
    def _seconds(self) -> float:
        return self.position.seconds + time.monotonic() - self._began

    def _finished(self) -> bool:
        config, history = self.config, self.position.history
        looks = len(history) - 1 - _best(history)
        return (
            self.position.step >= config.steps
            or (config.patience is not None and looks >= config.patience)
            or (config.max_seconds is not None and self._seconds >= config.max_seconds)
        )

    def _step(self) -> None:
        config, position = self.config, self.position
        count = config.rows * config.accumulate
        rows = rows_of(position.step, count, len(self.job.data), config.seed)
        losses = []
        for first in range(0, count, config.rows):
            at = torch.tensor(rows[first : first + config.rows])
            losses.append(self._backward(at, share=1 / config.accumulate))
            self.student.collect()
        loss = finite(torch.stack(losses).mean(), f"the loss of step {position.step + 1}")
        self.student.step(position.step)
        position.losses.append(float(loss))
        position.step += 1

    def _backward(self, at: Tensor, *, share: float) -> Tensor:
        data = self.job.data
        part = Batch(prompt_BP=data.prompt_BP[at], continuation_BC=data.continuation_BC[at])
        if self.data_dense is None:
            dense_BCE = dense_stream(self.dense, part)
        else:
            dense_BCE = self.data_dense[at].to(part.prompt_BP.device)
        return backward_kl(self.trained, part, dense_BCE, share=share)

    @torch.no_grad()
    def _evaluate(self) -> None:
        position, rows, held_out = self.position, self.config.rows, self.job.held_out
        parts = []
        for first in range(0, len(held_out), rows):
            part = held_out[first : first + rows]
            dense_BCE = self.held_out_dense[first : first + rows].to(part.prompt_BP.device)
            student_BCE = self.trained.last_stream(part)
            parts.append(kl_of(self.student.model, dense_BCE, student_BCE).mean(1))
        losses = position.losses
        point = Point(
            step=position.step,
            train_kl=sum(losses) / len(losses) if losses else None,
            held_out_kl=float(finite(torch.cat(parts), "the held-out KL").mean()),
            seconds=self._seconds,
        )
        position.history.append(point)
        position.losses = []
        if _best(position.history) == len(position.history) - 1:
            self.best = self.student.copy_weights(self.job.model.dtype)
        train = "" if point.train_kl is None else f"train KL {point.train_kl:.4f}, "
        self.say(f"step {point.step}: {train}held-out KL {point.held_out_kl:.4f}")

    def _dense_streams(self, batch: Batch) -> Tensor:
        """On the CPU: a GPU's memory is needed for other things."""
        rows = self.config.rows
        parts = (batch[first : first + rows] for first in range(0, len(batch), rows))
        return torch.cat([dense_stream(self.dense, part).cpu() for part in parts])

    def _save(self) -> None:
        if self.checkpoint is not None:
            here = Position(**{**vars(self.position), "seconds": self._seconds})
            groups = {**self.student.state(), "best": self.best}
            save(self.checkpoint, self.settings, here, groups)
        self._saved = time.monotonic()

    def _resume(self, path: Path) -> None:
        masters, best = self.student.masters, self.job.model.dtype
        self.position, groups = load(path, self.settings, masters, best)
        self.student.load(groups, self.position.step)
        self.best = groups["best"]


def _best(history: list[Point]) -> int:
    """Index of the lowest held-out KL, the first of equals."""
    best = 0
    for i, point in enumerate(history):
        if point.held_out_kl < history[best].held_out_kl:
            best = i
    return best
