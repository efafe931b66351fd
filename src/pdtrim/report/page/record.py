"""What the page shows, whatever kind of run it came from."""

from __future__ import annotations

from dataclasses import dataclass, field

from pdtrim.errors import PdtrimError

MOST_ROWS = 1000
"""Of one run: more is no page that a person reads."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where numbers come from.

    Attributes:
        facts: name and value, in the order in which they are shown.
        command: that makes such a run; words in capitals are what the run does not record.
    """

    path: str
    kind: str
    facts: tuple[tuple[str, str], ...]
    command: str


@dataclass(frozen=True, kw_only=True)
class Stages:
    """A plan's gates.

    Attributes:
        attention: by stage, one of ``full``, ``kv`` and ``off`` a layer.
        mlp: by stage, whether each layer's MLP runs.
        sent: what of the prompt's cache travels, and in which layers.
    """

    attention: dict[str, tuple[str, ...]]
    mlp: dict[str, tuple[bool, ...]]
    sent: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Losses of losing a block.

    Attributes:
        losses: one row a way, one number a block.
    """

    title: str
    unit: str
    ways: tuple[str, ...]
    losses: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Sent:
    """One way to send a prompt's cache.

    Attributes:
        sent_bytes: mean a prompt.
        encode_s, decode_s: None where the run does not measure them.
        kl: nats a continuation token; None where the run measures no quality.
    """

    name: str
    sent_bytes: float
    encode_s: float | None = None
    decode_s: float | None = None
    kl: float | None = None
    kl_error: float | None = None
    blocks: str | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """Text in rows; the first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A mean with its interval, in the unit of its chart."""

    name: str
    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Case:
    """One simulated point beside the one that was asked for.

    Attributes:
        gpus: that the pruned fleet saves; None with a reason.
    """

    label: str
    gpus: int | None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Savings:
    """The dense fleet beside the pruned one.

    Attributes:
        dense_gpus, pruned_gpus: None with a reason where a fleet misses its targets.
        search_s: of the work to prune, where its price is the search's; None if it was given.
    """

    dense_gpus: int | None
    pruned_gpus: int | None
    reasons: tuple[str, ...]
    gpu_hour: float
    work_cost: float
    search_s: float | None
    gpu_watts: float | None
    cases: tuple[Case, ...]
    table: Table
    sources: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One RUN, read."""

    source: Source
    stages: Stages | None = None
    maps: tuple[HeatMap, ...] = ()
    sent: tuple[Sent, ...] = ()
    tables: tuple[Table, ...] = ()
    bars: tuple[Bar, ...] = ()
    bars_unit: str = ""
    answers: tuple[tuple[str, str], ...] = ()
    savings: Savings | None = None
    problems: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        sizes = [len(self.sent), len(self.bars), *(len(table.rows) for table in self.tables)]
        if max(sizes) > MOST_ROWS:
            raise PdtrimError(
                f"{self.source.path} has {max(sizes):,} rows: a page takes {MOST_ROWS:,} a run"
            )
