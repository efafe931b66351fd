"""Charts as numbers: where marks, ticks and words of an SVG stand. The template draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pdtrim.report.page.record import Bar, HeatMap, Sent

WIDTH, HEIGHT = 640.0, 360.0
LEFT, RIGHT, TOP, BOTTOM = 64.0, 16.0, 14.0, 48.0
KL_FLOOR = 1e-4
"""The least KL that is told apart; less is noise."""
LEVELS = 8
"""Of colour in a heat map."""
CELL, ROW, NAMES = 26.0, 30.0, 96.0
LINE, WORDS = 24.0, 260.0


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A place on an axis and its words."""

    at: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A point, by the number of its row; ``best`` if no other has both less KL and fewer bytes."""

    x: float
    y: float
    number: int
    best: bool
    title: str


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """Quality against bytes, both axes on a log scale."""

    marks: tuple[Mark, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Of a heat map."""

    x: float
    y: float
    level: int
    text: str
    title: str


@dataclass(frozen=True, kw_only=True)
class Heat:
    """A row a way, a column a block."""

    width: float
    height: float
    cells: tuple[Cell, ...]
    rows: tuple[Tick, ...]
    columns: tuple[Tick, ...]


@dataclass(frozen=True, kw_only=True)
class Whisker:
    """A mean with its interval, in the chart's pixels."""

    y: float
    low: float
    mean: float
    high: float
    name: str
    title: str


@dataclass(frozen=True, kw_only=True)
class Whiskers:
    """Rows of intervals on one axis; ``zero`` is None where 0 is not on it."""

    height: float
    rows: tuple[Whisker, ...]
    ticks: tuple[Tick, ...]
    zero: float | None


def best_rows(sent: Sequence[Sent]) -> set[int]:
    """Rows that no other beats in KL and in bytes."""
    order = sorted(
        (i for i, row in enumerate(sent) if row.kl is not None),
        key=lambda i: (sent[i].sent_bytes, sent[i].kl),
    )
    best, least = set(), math.inf
    for i in order:
        kl = sent[i].kl
        assert kl is not None
        if kl < least:
            best.add(i)
            least = kl
    return best


def scatter(sent: Sequence[Sent]) -> Scatter | None:
    """None where fewer than two rows have a quality and bytes."""
    shown = [
        (i, row.sent_bytes, max(row.kl, KL_FLOOR))
        for i, row in enumerate(sent)
        if row.kl is not None and row.sent_bytes > 0
    ]
    if len(shown) < 2:
        return None
    xs = _log_scale([b for _, b, _ in shown], LEFT, WIDTH - RIGHT)
    ys = _log_scale([kl for _, _, kl in shown], HEIGHT - BOTTOM, TOP)
    best = best_rows(sent)
    marks = [
        Mark(
            x=xs.at(size),
            y=ys.at(kl),
            number=i + 1,
            best=i in best,
            title=f"{i + 1}: {sent[i].name}, {size / 1e6:.2f} MB, KL {sent[i].kl:.4f}",
        )
        for i, size, kl in shown
    ]
    return Scatter(
        marks=tuple(sorted(marks, key=lambda mark: mark.best)),
        x_ticks=tuple(Tick(at=xs.at(v), text=f"{v / 1e6:g}") for v in xs.ticks()),
        y_ticks=tuple(Tick(at=ys.at(v), text=f"{v:g}") for v in ys.ticks()),
    )


def heat(given: HeatMap) -> Heat:
    """Colours are on a log scale from the least loss that is told apart to the greatest."""
    top = max(max(max(row) for row in given.losses), 10 * KL_FLOOR)
    span = math.log(top / KL_FLOOR)
    cells = []
    for way, row in enumerate(given.losses):
        for block, loss in enumerate(row):
            share = math.log(max(loss, KL_FLOOR) / KL_FLOOR) / span
            cells.append(
                Cell(
                    x=NAMES + CELL * block,
                    y=ROW * way,
                    level=min(LEVELS - 1, int(share * LEVELS)),
                    text=_short(loss),
                    title=f"block {block}, {given.ways[way]}: {loss:.4f}",
                )
            )
    blocks = len(given.losses[0])
    return Heat(
        width=NAMES + CELL * blocks + 4,
        height=ROW * len(given.ways) + 40,
        cells=tuple(cells),
        rows=tuple(Tick(at=ROW * (i + 0.5), text=way) for i, way in enumerate(given.ways)),
        columns=tuple(Tick(at=NAMES + CELL * (i + 0.5), text=str(i)) for i in range(blocks)),
    )


def whiskers(bars: Sequence[Bar]) -> Whiskers | None:
    """None for no bars."""
    if not bars:
        return None
    low, high = min(bar.low for bar in bars), max(bar.high for bar in bars)
    step = _step(max(high - low, 1e-9) / 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    last = max(last, first + 1)
    scale = (WIDTH - RIGHT - WORDS) / ((last - first) * step)

    def at(value: float) -> float:
        return WORDS + (value - first * step) * scale

    return Whiskers(
        height=LINE * len(bars) + BOTTOM,
        rows=tuple(
            Whisker(
                y=LINE * (i + 0.5) + 4,
                low=at(bar.low),
                mean=at(bar.mean),
                high=at(bar.high),
                name=bar.name,
                title=f"{bar.name}: {bar.mean:.2f} [{bar.low:.2f}, {bar.high:.2f}]",
            )
            for i, bar in enumerate(bars)
        ),
        ticks=tuple(Tick(at=at(i * step), text=f"{i * step:g}") for i in range(first, last + 1)),
        zero=at(0.0) if first < 0 < last else None,
    )


@dataclass(frozen=True, kw_only=True)
class _Log:
    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """1, 2 and 5 times powers of ten; powers alone over more than two of them."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        factors = (1, 2, 5) if self.high < 100 * self.low else (1,)
        values = [float(f"{factor}e{power}") for power in powers for factor in factors]
        return [value for value in values if self.low <= value <= self.high]


def _log_scale(values: Sequence[float], start: float, end: float) -> _Log:
    return _Log(low=min(values) / 1.15, high=max(values) * 1.15, start=start, end=end)


def _step(rough: float) -> float:
    """1, 2 or 5 times a power of ten, at least ``rough``."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)


def _short(loss: float) -> str:
    if loss < KL_FLOOR:
        return "0"
    return f"{loss:.1g}".replace("0.", ".").replace("e-0", "e-")
