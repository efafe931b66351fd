"""Logit distillation: train what a stage keeps until the pair speaks like the dense model.

The loss is KL(dense || pair) on continuation tokens under prefill/decode inference with the plan's
gates and KV policy: the simulator itself (``stage/forward.py``), with gradients. A stage that does
not train keeps its weights. Prefill is heard through its keys and values alone, whose gradient
comes from decode's attention; SwiftKV (2410.03960) trains one model's projections in this way.
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
from pdtrim.distill.trainable import prefill_names, running, trainable_layers
from pdtrim.distill.warm import fitted_kv
from pdtrim.finite import finite
from pdtrim.models.model import Model
from pdtrim.models.swap import Weights, swap_blocks
from pdtrim.plan import Stage
from pdtrim.progress import Advance, Progress, silent
from pdtrim.stage.forward import Batch, Pair, Trimmed


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """The blocks with the lowest held-out KL, the start included.

    Attributes:
        blocks: of decode by layer, in the model's type; for ``swap_blocks``.
        prefill: what trained of prefill, likewise.
        held_out_before, held_out_after: KL to the dense model, nats a token.
    """

    blocks: dict[int, Weights]
    prefill: dict[int, Weights]
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
    """Train a stage's weights; the same seed gives the same weights on a CPU.

    Args:
        model: the dense model: the teacher, and where decode's blocks start.
        trimmed: what runs; its decode model is the dense one, whose blocks ``start`` replaces.
            Prefill's weights start as its prefill model has them.
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
        self.job, self.config, self.say = job, job.config, say
        self.dense = frozen(job.model, DTYPES[job.config.compute])
        self.students: dict[Stage, Student] = {}
        pair = Pair(prefill=self._prefill(), decode=self._decode())
        self.trained = replace(job.trimmed, pair=pair)
        self.first = min(layer for one in self.students.values() for layer in one.layers)
        self.checkpoint = checkpoint
        self.settings = {} if checkpoint is None else job.settings()
        self.position = Position(step=0, seconds=0.0, losses=[], history=[])
        self.best: dict[str, Tensor] = {}
        if checkpoint is not None and checkpoint.exists():
            self._resume(checkpoint)
        self.held_out = self._streams(job.held_out)
        self.data = self._streams(job.data) if job.config.keep_dense else None
        self._began = self._saved = time.monotonic()  # what is kept was no training

    def _decode(self) -> Model:
        job, config = self.job, self.config
        if config.stage == "prefill":
            return swap_blocks(self.dense, job.start) if job.start else self.dense
        gates = job.trimmed.gates
        names = running(
            job.model, gates, "decode", trainable_layers(config.which, gates, job.start)
        )
        student = Student(job.model, self.dense, names, job.start, config)
        self.students["decode"] = student
        return student.model

    def _prefill(self) -> Model:
        job, config = self.job, self.config
        own = job.trimmed.pair.prefill
        base = self.dense if own is job.model else frozen(own, self.dense.dtype)
        if config.stage == "decode":
            return base
        names = prefill_names(config.parts, own, job.trimmed.gates)
        student = Student(own, base, names, {}, config)
        self.students["prefill"] = student
        return student.model

    def train(self, advance: Advance) -> None:
        """Train to the end, from wherever the run stands."""
        position, config = self.position, self.config
        advance(position.step)
        if not position.history:
            self._evaluate()
            self._warm_start()
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
        for layer, weights in by_layer(of_stage(self.best, "decode")).items():
            blocks[layer] = {**blocks.get(layer, {}), **weights}
        return Distilled(
            blocks=blocks,
            prefill=by_layer(of_stage(self.best, "prefill")),
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

    def _warm_start(self) -> None:
        """Begin at the closed-form fit of prefill's keys and values, if held-out text gains."""
        student = self.students.get("prefill")
        if student is None or not self.config.fit_rows:
            return
        before = student.copy_weights(torch.float32)
        data = self.job.data
        at = torch.linspace(0, len(data) - 1, min(self.config.fit_rows, len(data))).long()
        student.put(fitted_kv(self.dense, self.trained, data[at], student.layers))
        self._evaluate("keys and values fitted")
        if _best(self.position.history) == 0:
            student.put(before)

    def _step(self) -> None:
        config, position = self.config, self.position
        count = config.rows * config.accumulate
        rows = rows_of(position.step, count, len(self.job.data), config.seed)
        losses = []
        for first in range(0, count, config.rows):
            at = torch.tensor(rows[first : first + config.rows])
            losses.append(self._backward(at, share=1 / config.accumulate))
            for student in self.students.values():
                student.collect()
        loss = finite(torch.stack(losses).mean(), f"the loss of step {position.step + 1}")
        for student in self.students.values():
            student.step(position.step)
        position.losses.append(float(loss))
        position.step += 1

    def _backward(self, at: Tensor, *, share: float) -> Tensor:
        part = self.job.data[at]
        if self.data is None:
            return backward_kl(self.trained, part, dense_stream(self.dense, part), share=share)
        dense_BCE, *entry = (x[at].to(part.prompt_BP.device) for x in self.data)
        x_BNE, y_BCE = entry
        return backward_kl(
            self.trained, part, dense_BCE, share=share, entry=(x_BNE, y_BCE), start=self.first
        )

    @torch.no_grad()
    def _evaluate(self, what: str = "") -> None:
        position, rows, held_out = self.position, self.config.rows, self.job.held_out
        parts = []
        for first in range(0, len(held_out), rows):
            part = held_out[first : first + rows]
            dense_BCE, x_BNE, y_BCE = (
                x[first : first + rows].to(part.prompt_BP.device) for x in self.held_out
            )
            trace = [(x_BNE, y_BCE)] * (self.first + 1)
            student_BCE = self.trained.streams(part, resume=trace, start=self.first)[-1][1]
            parts.append(kl_of(self.trained.pair.decode, dense_BCE, student_BCE).mean(1))
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
            self.best = under_one_name(
                {s: one.copy_weights(self.job.model.dtype) for s, one in self.students.items()}
            )
        train = "" if point.train_kl is None else f"train KL {point.train_kl:.4f}, "
        self.say(f"{what or f'step {point.step}'}: {train}held-out KL {point.held_out_kl:.4f}")

    @torch.no_grad()
    def _streams(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The dense model's last stream ``[B, C, E]``, and those that enter the first layer that
        trains, ``[B, N, E]`` and ``[B, C, E]``.

        On the CPU: a GPU's memory is needed for other things.
        """
        rows = self.config.rows
        columns: tuple[list[Tensor], ...] = ([], [], [])
        for part in batch.parts(rows):
            entry = self.trained.streams(part, stop=self.first)[-1]
            for column, made in zip(columns, (dense_stream(self.dense, part), *entry), strict=True):
                column.append(made.cpu())
        dense_BCE, x_BNE, y_BCE = (torch.cat(column) for column in columns)
        return dense_BCE, x_BNE, y_BCE

    def _save(self) -> None:
        if self.checkpoint is not None:
            here = Position(**{**vars(self.position), "seconds": self._seconds})
            states = {stage: student.state() for stage, student in self.students.items()}
            groups = {
                group: under_one_name({stage: state[group] for stage, state in states.items()})
                for group in ("weight", "mean", "square")
            }
            save(self.checkpoint, self.settings, here, {**groups, "best": self.best})
        self._saved = time.monotonic()

    def _resume(self, path: Path) -> None:
        masters = under_one_name(
            {stage: student.masters for stage, student in self.students.items()}
        )
        self.position, groups = load(path, self.settings, masters, self.job.model.dtype)
        for stage, student in self.students.items():
            state = {group: of_stage(tensors, stage) for group, tensors in groups.items()}
            student.load(state, self.position.step)
        self.best = groups["best"]


def under_one_name(weights: Mapping[Stage, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Weights of both stages under one another's names; prefill's begin with ``prefill.``."""
    return {
        f"prefill.{key}" if stage == "prefill" else key: tensor
        for stage, of in weights.items()
        for key, tensor in of.items()
    }


def of_stage(weights: Mapping[str, Tensor], stage: Stage) -> dict[str, Tensor]:
    """One stage's of them, by ``layer.name``."""
    mine = stage == "prefill"
    return {
        key.removeprefix("prefill."): tensor
        for key, tensor in weights.items()
        if key.startswith("prefill.") == mine
    }


def _best(history: list[Point]) -> int:
    """Index of the lowest held-out KL, the first of equals."""
    best = 0
    for i, point in enumerate(history):
        if point.held_out_kl < history[best].held_out_kl:
            best = i
    return best
