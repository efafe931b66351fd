"""The result file of a comparison, schema ``pdtrim.compare/1``.

Scores are shares of 1, as the tasks report them. Scores of single items stay in the cells.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from pdtrim.bench.stages import StageRatios
from pdtrim.evaluate.compare.systems import Setting
from pdtrim.evaluate.statistics import Interval
from pdtrim.keep.document import Document
from pdtrim.records import Frozen


class TaskInfo(Frozen):
    """A task as every system was given it; the fields are those of its scores."""

    task: str
    version: str
    source: str
    shots: int
    count: int
    items_hash: str
    main: str


class PairFacts(Frozen):
    """What a plan's pair saves, measured.

    Attributes:
        prefill_removed, decode_removed: the share of the blocks' parameters that the stage's
            checkpoint no longer holds.
        kv_bytes: mean bytes a prompt that cross the socket, headers included.
    """

    prefill_removed: float
    decode_removed: float
    kv_bytes: float = Field(ge=0)


class Run(Frozen):
    """One system with one seed.

    Attributes:
        failed: why there is no plan; the other fields are then empty.
        plan_digest: None for the dense model.
        scores: by task, its main metric; that is a perplexity where its name is ``ppl``.
        times: None if they were not taken.
        search_block_tokens, wall_s: of making the plan.
    """

    seed: int
    failed: str | None = None
    plan_digest: str | None = None
    calibration: str | None = None
    calibration_hash: str | None = None
    facts: PairFacts | None = None
    scores: dict[str, float] = Field(default_factory=dict)
    average: float | None = None
    times: StageRatios | None = None
    search_block_tokens: int = Field(default=0, ge=0)
    wall_s: float = Field(default=0.0, ge=0)


class SystemRow(Frozen):
    """A system over its seeds; numbers are means over the seeds that have a plan.

    Attributes:
        setting: None for the dense model.
        asked_prefill, asked_decode: shares that the plans had to meet; None where the plans were
            given, and for the dense model.
        failed: why no seed has a plan.
        scores: of the tasks that enter the average; ``ppl`` has the others, perplexities.
        average: of the tasks, each item's score being its mean over seeds; None without such tasks.
        spread: the least and the greatest average of a seed.
        of_dense: the average over the dense model's.
        to_dense, to_baseline: paired differences of the average to the dense model and to the best
            training-free baseline.
        kv_compression: the dense model's KV bytes over this system's.
        prefill_time, decode_time: the stage's time over the dense model's.
    """

    name: str
    method: str
    setting: Setting | None = None
    trained: bool = False
    asked_prefill: float | None = None
    asked_decode: float | None = None
    runs: tuple[Run, ...]
    failed: str | None = None
    prefill_removed: float = 0.0
    decode_removed: float = 0.0
    scores: dict[str, float] = Field(default_factory=dict)
    ppl: dict[str, float] = Field(default_factory=dict)
    average: Interval | None = None
    spread: tuple[float, float] | None = None
    of_dense: float | None = None
    to_dense: Interval | None = None
    to_baseline: Interval | None = None
    kv_bytes: float | None = None
    kv_compression: float | None = None
    prefill_time: float | None = None
    decode_time: float | None = None
    search_block_tokens: float = 0.0
    wall_s: float = 0.0


class Comparison(Document):
    """A result file.

    Attributes:
        settings: what was asked for.
        best_baseline: the system that ``to_baseline`` is against; None if there is none.
        rows: the dense model first, then the systems in the order in which they are listed.
    """

    schema_id: Literal["pdtrim.compare/1"] = Field(default="pdtrim.compare/1", alias="schema")
    model: str
    model_fingerprint: str
    dtype: str
    device: str
    remove: float
    settings: dict[str, Any]
    tasks: tuple[TaskInfo, ...]
    best_baseline: str | None
    rows: tuple[SystemRow, ...] = Field(min_length=1)
    versions: dict[str, str]
    host: dict[str, str | int]

    @property
    def dense(self) -> SystemRow:
        """The dense model's row."""
        return self.rows[0]
