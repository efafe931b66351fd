"""Train what the stages keep for what was removed: what ``pdtrim distill`` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pdtrim.errors import PdtrimError
from pdtrim.keep.files import remove_parts
from pdtrim.keep.folder import output_file
from pdtrim.progress import Progress, silent
from pdtrim.words import Parts, Reading, TrainedStage, Which

if TYPE_CHECKING:
    from pdtrim.bundle import TrimPlan
    from pdtrim.distill.job import DistillConfig
    from pdtrim.distill.plan import Trained
    from pdtrim.models.model import Model
    from pdtrim.stage.forward import Batch

KEPT_BYTES = 2**32
"""Memory that streams may take which are kept because training comes back to them."""

MOST_RECALL = 100
"""Sequences that need recall, for one of the others: they are cut out of these."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train a plan.

    Attributes:
        text: sources of training text, as FILE, hub:NAME, or self.
        stage: whose weights train.
        train: what trains of prefill, behind its first cut; each holds the one before it.
        blocks: which decode blocks train, as merged pairs, the cuts' neighbours, or all.
        recall: sequences that need recall, as a share of the others, made of the same text; 1 if
            not given and prefill trains, else 0.
        merge: which removed blocks merge with a neighbour first; pairs if ``blocks`` is pairs, else
            none, if not given.
        prompt_tokens: tokens of each prompt.
        continuation_tokens: tokens of each continuation.
        sequences: training sequences of each text, or all that it has.
        held_out: sequences of each text that choose the best weights.
        steps: training steps at most.
        rows: sequences that run together.
        accumulate: groups of ``rows`` sequences in a step.
        learning_rate: highest learning rate of the schedule.
        minutes: minutes of training at most, over all resumes.
        seed: seed of the text and of the order of the rows.
    """

    text: tuple[str, ...] = ("self",)
    stage: TrainedStage = "decode"
    train: Parts = "kv"
    blocks: Which = "all"
    recall: float | None = None
    merge: Reading | None = None
    prompt_tokens: int = 256
    continuation_tokens: int = 256
    sequences: int = 256
    held_out: int = 16
    steps: int = 1000
    rows: int = 4
    accumulate: int = 4
    learning_rate: float = 3e-4
    minutes: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.recall is not None and not 0 <= self.recall <= MOST_RECALL:
            raise PdtrimError(
                f"--recall {self.recall:g} is a share of the other sequences: 0 to {MOST_RECALL}"
            )


def distill_plan(
    plan_file: str | Path,
    config: TrainConfig,
    output: str | Path,
    *,
    model: str | None = None,
    dtype: str = "bfloat16",
    device: str = "cpu",
    progress: Progress = silent,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[TrimPlan, Trained]:
    """Train decode's blocks or prefill's; an interrupted training goes on from its checkpoint.

    Args:
        plan_file: the plan; it stays as it is.
        output: the plan file to write. The checkpoint stands beside it while the training runs.
        model: where the dense model is, if not where the plan says.
        say: takes a line for people.

    Returns:
        The new plan, and what the training did; its KLs are nats a token on held-out text.

    Raises:
        PdtrimError: no such plan, text that cannot be read, nothing to train, or a checkpoint of
            another training.
    """
    from pdtrim.bundle import TrimPlan
    from pdtrim.distill.plan import Training, train_plan, trained_plan
    from pdtrim.distill.sets import SetRule
    from pdtrim.exported import base_model

    plan_file, output = Path(plan_file), Path(output)
    if output.resolve() == plan_file.resolve():
        raise PdtrimError("-o names the plan itself: give the trained one a name of its own")
    if config.stage == "prefill" and (config.blocks != "all" or config.merge not in (None, "none")):
        raise PdtrimError("--blocks and --merge are of decode: leave them out, or use --stage both")
    with output_file(output):
        loaded = TrimPlan.open(plan_file)
        dense = base_model(loaded.plan, source=model, dtype=dtype, device=device)
        data, rest = training_text(dense, config, progress, say)
        checkpoint = output.with_name(f"{output.stem}.training.safetensors")
        remove_parts(checkpoint)
        if checkpoint.exists():
            say(f"going on from {checkpoint}")
        merge = config.merge or ("pairs" if config.blocks == "pairs" else "none")
        how = distillation(dense, data, config)
        trained = train_plan(
            loaded,
            dense,
            data,
            rest,
            Training(rule=SetRule(reading=merge), distillation=how),
            checkpoint=checkpoint,
            progress=progress,
            say=say,
        )
        made = trained_plan(loaded.plan, trained).save(output)
        checkpoint.unlink(missing_ok=True)
    return made, trained


def training_text(
    model: Model, config: TrainConfig, progress: Progress, say: Callable[[str], None]
) -> tuple[Batch, Batch]:
    """What is trained on and what chooses the best weights, each with its rows of recall."""
    from pdtrim.calibration.batches import CalibrationConfig
    from pdtrim.calibration.mixture import load_mixture

    lengths = CalibrationConfig(
        prompt_tokens=config.prompt_tokens,
        continuation_tokens=config.continuation_tokens,
        search=config.sequences,
        rerank=config.held_out,
        seed=config.seed,
    )
    data, rest = load_mixture(model, config.text, lengths, progress=progress, say=say)
    share = config.recall if config.recall is not None else float(config.stage != "decode")
    if not share:
        return data, rest
    asked = model if answers_by_letter(model, data, config.seed, say) else None
    data, rest = (with_recall_rows(model, part, share, config.seed, asked) for part in (data, rest))
    return data, rest


def distillation(model: Model, text: Batch, config: TrainConfig) -> DistillConfig:
    """How blocks are trained on a text, in the type that the model is loaded with."""
    from pdtrim.distill.job import DistillConfig

    return DistillConfig(
        stage=config.stage,
        which=config.blocks,
        parts=config.train,
        keep_dense=pays_to_keep(model, text, config),
        steps=config.steps,
        rows=config.rows,
        accumulate=config.accumulate,
        learning_rate=config.learning_rate,
        max_seconds=None if config.minutes is None else 60 * config.minutes,
        compute="float32" if model.dtype.itemsize == 4 else "bfloat16",
        seed=config.seed,
    )


def answers_by_letter(model: Model, text: Batch, seed: int, say: Callable[[str], None]) -> bool:
    """Whether the dense model finds the right letters of questions about a text."""
    from pdtrim.calibration.recall_training import KNOWN, letters_known
    from pdtrim.calibration.tokens import begin_ids

    begin = len(begin_ids(model.need_tokenizer()))
    known = letters_known(model, text, begin=begin, seed=seed)
    if known is None:
        say("recall does not ask for letters of options: no room or no words for a question")
        return False
    does = "asks" if known > KNOWN else "does not ask"
    say(f"recall {does} for letters of options: likelihood of the right ones {known:.2f}")
    return known > KNOWN


def with_recall_rows(
    model: Model, text: Batch, share: float, seed: int, asked: Model | None
) -> Batch:
    """Text, and below it rows that need recall, which are made of it."""
    from pdtrim.calibration.recall_training import recall_rows
    from pdtrim.calibration.tokens import begin_ids
    from pdtrim.stage.forward import Batch

    count = round(share * len(text))
    if not count:
        return text
    begin = len(begin_ids(model.need_tokenizer()))
    return Batch.join([text, recall_rows(text, count, begin=begin, seed=seed, asked=asked)])


def pays_to_keep(model: Model, text: Batch, config: TrainConfig) -> bool:
    """Whether prefill's training reads its text more than once, and the streams have room."""
    tokens = text.prompt_BP.shape[1] + 2 * text.continuation_BC.shape[1]
    size = len(text) * tokens * int(model.config.hidden_size) * model.dtype.itemsize
    again = config.steps * config.rows * config.accumulate > len(text)
    return config.stage == "prefill" and again and size <= KEPT_BYTES
