"""One training run: its settings, and everything else that decides its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from pdtrim.distill.student import Compute, Descent
from pdtrim.errors import PlanError
from pdtrim.keep.settings import Settings
from pdtrim.keep.tensors import ids_digest, tensors_digest
from pdtrim.models.model import Model
from pdtrim.models.swap import Weights
from pdtrim.stage.forward import Batch, Trimmed
from pdtrim.words import Parts, TrainedStage, Which

FREE = ("max_seconds", "checkpoint_seconds")
"""Settings that may change when a run is resumed: they decide when it stops, not what it does."""
OF_PREFILL = ("stage", "parts", "fit_rows")
"""Settings that a training of decode alone does not have."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Descent):
    """How to train; the fields of :class:`Descent`, and these.

    Attributes:
        stage: whose weights train.
        which: blocks of decode that train, see ``trainable.py``.
        parts: what of prefill trains.
        fit_rows: sequences that prefill's projections of skipped blocks are fitted to in closed
            form before the first step, layer by layer, to the dense model's keys and values; the
            fit stands if the held-out text gains. 0 for none.
        rows: sequences run together; ``accumulate`` times as many make one step.
        seed: of the order of the rows, new in each epoch.
        compute: type of the forward and backward pass; weights and Adam's states are fp32.
        keep_dense: keep the dense model's last stream of all rows in memory, and the streams that
            enter the first layer that trains (E numbers a token of each), instead of running all
            that again each time: for several epochs.
        max_seconds: of training, over all resumes; None for no limit.
        evaluate_every: steps between two looks at the held-out text.
        patience: looks without a new best after which it stops; None for never.

    Raises:
        PlanError: a number out of range.
    """

    stage: TrainedStage = "decode"
    which: Which = "all"
    parts: Parts = "kv"
    fit_rows: int = 64
    rows: int = 4
    accumulate: int = 1
    seed: int = 0
    compute: Compute = "bfloat16"
    keep_dense: bool = False
    max_seconds: float | None = None
    checkpoint_seconds: float = 60
    evaluate_every: int = 50
    patience: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "rows", "accumulate", "evaluate_every"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} must be at least 1")
        if self.fit_rows < 0:
            raise PlanError("fit_rows must be 0 or more")
        rated = 0 < self.learning_rate < math.inf and 0 <= self.weight_decay < math.inf
        if not rated or not 0 <= self.warmup <= 1:
            raise PlanError("the learning rate must be above 0, warmup a share, decay 0 or more")
        if self.max_seconds is not None and not self.max_seconds >= 0:
            raise PlanError("the time for a training must be 0 or more")

    @property
    def what(self) -> str:
        """What trains, in words."""
        named = {"prefill": f"prefill {self.parts}", "decode": self.which}
        return " and ".join(named.values()) if self.stage == "both" else named[self.stage]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained on what; the fields are ``distill``'s arguments.

    Raises:
        PlanError: no rows.
    """

    model: Model
    trimmed: Trimmed
    data: Batch
    held_out: Batch
    config: DistillConfig
    start: Mapping[int, Weights]

    def __post_init__(self) -> None:
        if not len(self.data) or not len(self.held_out):
            raise PlanError("distillation needs at least 1 row of text and 1 held-out row")

    def settings(self) -> Settings:
        """Everything that decides the run's numbers."""
        policy, prefill = self.trimmed.policy, self.trimmed.pair.prefill
        left_out = (*FREE, *OF_PREFILL) if self.config.stage == "decode" else FREE
        return {
            **{key: value for key, value in asdict(self.config).items() if key not in left_out},
            "gates": self.trimmed.gates.model_dump(mode="json"),
            "kv": [rule.model_dump(mode="json") for rule in policy.rules],
            "block_size": policy.block_size,
            "model": self.model.fingerprint,
            "dtype": self.model.dtype_name,
            "prefill": None if prefill is self.model else prefill.fingerprint,
            "text": ids_digest(self.data.prompt_BP, self.data.continuation_BC),
            "held_out": ids_digest(self.held_out.prompt_BP, self.held_out.continuation_BC),
            "merged_blocks": tensors_digest(
                {
                    f"{layer}.{name}": tensor.float()
                    for layer, weights in self.start.items()
                    for name, tensor in weights.items()
                }
            ),
        }
