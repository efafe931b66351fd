"""A picture of a result: divergence from dense against compression of the KV, a line a family."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pdtrim.errors import PdtrimError
from pdtrim.evaluate.result import Result, Row
from pdtrim.report.figure import new_figure, save_figure

FLOOR = 1e-4
"""The least KL that is drawn: a log axis has no 0, and less is noise."""

# Okabe and Ito's colours, told apart with any colour vision; their yellow is too pale for a line
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
# as many as share no factor with the colours: no pair comes twice in 56 families
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
STYLES = ("-", "--", ":", "-.")

STEPS = (1, 1.5, 2, 3, 4, 5, 6, 8)
WIDE_STEPS = (1, 2, 5)
"""Of an axis on which the labels of ``STEPS`` would touch."""


def plot_kv(result: Result, path_stem: Path) -> tuple[Path, Path]:
    """Write ``path_stem`` + ``.png`` and ``.svg``; the same result gives the same SVG.

    A row named ``family@setting`` is a point of the line ``family``; other rows are not drawn.

    Raises:
        PdtrimError: no row is so named, or matplotlib is missing.
    """
    lines = families(result.rows)
    if not lines:
        raise PdtrimError("nothing to plot: no row has a name such as family@setting")
    # a long legend needs more height
    figure = new_figure(8, max(5, 1.5 + 0.22 * len(lines)))
    axes = figure.add_subplot()
    handles = {name: _draw(axes, i, rows) for i, (name, rows) in enumerate(lines.items())}
    _scale(axes, [row for rows in lines.values() for row in rows])
    # the figure's title, not the axes': it may be wider than them and runs above the legend
    figure.suptitle(_title(result), x=0.01, ha="left", fontsize=10, parse_math=False)
    # from top to bottom as the lines end on the right
    order = sorted(handles, key=lambda name: -lines[name][-1].kl)
    axes.legend(
        [handles[name] for name in order],
        order,
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
        borderaxespad=0,
        frameon=False,
        fontsize="small",
        handlelength=2.8,
        labelspacing=0.7,
    )
    png, svg = (path_stem.with_name(path_stem.name + end) for end in (".png", ".svg"))
    save_figure(figure, png)
    from matplotlib import rc_context

    # text as text, and ids that do not change from run to run
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "pdtrim"}):
        save_figure(figure, svg, metadata={"Date": None})
    return png, svg


def _draw(axes: Any, number: int, rows: Sequence[Row]) -> Any:
    """A family's line with its bars; returns what the legend shows of it."""
    y = [max(row.kl, FLOOR) for row in rows]
    # a log axis has no bar down to 0, and a point on the floor none below it
    down = [
        max(0.0, at - max(row.kl - row.kl_error, FLOOR)) for at, row in zip(y, rows, strict=True)
    ]
    up = [max(0.0, row.kl + row.kl_error - at) for at, row in zip(y, rows, strict=True)]
    drawing = axes.errorbar(
        [row.kv_compression for row in rows],
        y,
        yerr=(down, up),
        color=COLOURS[number % len(COLOURS)],
        marker=MARKERS[number % len(MARKERS)],
        linestyle=STYLES[number // len(COLOURS) % len(STYLES)],
        linewidth=1.4,
        markersize=6,
        markeredgecolor="white",
        markeredgewidth=0.5,
        elinewidth=0.7,
        capsize=2,
        capthick=0.7,
    )
    return drawing.lines[0]  # without the bars, which would blur the legend


def _scale(axes: Any, drawn: Sequence[Row]) -> None:
    """Axes, their ticks and their words, by the points: a wide bar should not squeeze all lines."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    x_ticks = ticks([row.kv_compression for row in drawn])
    y_all = [max(row.kl, FLOOR) for row in drawn]
    floored = any(row.kl < FLOOR for row in drawn)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(x_ticks[0] / 1.06, x_ticks[-1] * 1.06)
    axes.set_ylim(min(y_all) / 1.5, max(y_all) * 1.6)
    axes.xaxis.set_major_locator(FixedLocator(x_ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:g}x"))
    decades = max(y_all) / min(y_all)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3e3 else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda at, _: ("≤ " if floored and at <= FLOOR * 1.01 else "") + f"{at:g}")
    )
    axes.grid(True, color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("compression of the KV bytes sent")
    axes.set_ylabel("KL to dense, nats a token")


def families(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by the part of the name before the first ``@``, each family by rising compression.

    Families come in the order of their first rows; a name without an ``@`` is left out.
    """
    found: dict[str, list[Row]] = {}
    for row in rows:
        family, at, _ = row.name.partition("@")
        if at:
            found.setdefault(family, []).append(row)
    return {
        family: sorted(members, key=lambda row: (row.kv_compression, row.kl))
        for family, members in found.items()
    }


def ticks(values: Sequence[float]) -> list[float]:
    """Round numbers from just below the least value to just above the largest."""
    low, high = min(values), max(values)
    steps = STEPS if high < 30 * low else WIDE_STEPS
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    # read from text, because 3 * 10.0**-1 is not 0.3
    marks = [float(f"{step}e{power}") for power in powers for step in steps]
    first = max(mark for mark in marks if mark <= low)
    last = min(mark for mark in marks if mark >= high)
    return [mark for mark in marks if first <= mark <= last]


def _title(result: Result) -> str:
    p = result.provenance
    what = (
        f"{p.sequences} sequences of {p.text},"
        f" prompt {p.prompt_tokens} + continuation {p.continuation_tokens} tokens, {p.dtype}"
    )
    return "\n".join(line for text in (p.model, what) for line in textwrap.wrap(text, 100))
