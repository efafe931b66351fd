"""A picture of a result: divergence from dense against compression of the KV, a line a family."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pdtrim.errors import PdtrimError
from pdtrim.evaluate.result import Result, Row

FLOOR = 1e-4
"""The least KL that is drawn: a log axis has no 0, and less is noise."""

# Okabe and Ito's colours, told apart with any colour vision; their yellow is too pale for a line
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
# as many as share no factor with the colours: no pair comes twice in 56 families
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLES = ("-", "--", ":", "-.")

TICKS = tuple(step * 10.0**power for power in range(-2, 5) for step in (1, 1.5, 2, 3, 4, 5, 6, 8))


def plot_kv(result: Result, path_stem: Path) -> tuple[Path, Path]:
    """Write ``path_stem`` + ``.png`` and ``.svg``; the same result gives the same SVG.

    A row named ``family@setting`` is a point of the line ``family``; other rows are not drawn.

    Raises:
        PdtrimError: no row is so named, or matplotlib is missing.
    """
    lines = families(result.rows)
    if not lines:
        raise PdtrimError("nothing to plot: no row has a name such as family@setting")
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
    except ImportError as error:
        raise PdtrimError("a plot needs matplotlib: pip install 'pdtrim[plot]'") from error

    drawn = [row for rows in lines.values() for row in rows]
    x_ticks = ticks([row.kv_compression for row in drawn])
    y_all = [max(row.kl, FLOOR) for row in drawn]
    floored = any(row.kl < FLOOR for row in drawn)

    # text as text, and ids that do not change from run to run
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pdtrim"}):
        figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_xscale("log")
        axes.set_yscale("log")
        handles: list[Any] = []
        for i, rows in enumerate(lines.values()):
            y = [max(row.kl, FLOOR) for row in rows]
            # a log axis has no bar to 0 or less
            below = [
                at - max(row.kl - row.kl_error, FLOOR / 10) for at, row in zip(y, rows, strict=True)
            ]
            above = [max(row.kl + row.kl_error, at) - at for at, row in zip(y, rows, strict=True)]
            handles.append(
                axes.errorbar(
                    [row.kv_compression for row in rows],
                    y,
                    yerr=[[max(0.0, down) for down in below], above],
                    color=COLOURS[i % len(COLOURS)],
                    marker=MARKERS[i % len(MARKERS)],
                    linestyle=STYLES[i // len(COLOURS) % len(STYLES)],
                    linewidth=1.5,
                    markersize=5.5,
                    markeredgecolor="white",
                    markeredgewidth=0.6,
                    elinewidth=0.7,
                    capsize=2,
                    capthick=0.7,
                )
            )
        axes.set_xlim(x_ticks[0] / 1.06, x_ticks[-1] * 1.06)
        # by the points: one wide bar should not squeeze all lines
        axes.set_ylim(min(y_all) / 1.5, max(y_all) * 1.6)
        axes.xaxis.set_major_locator(FixedLocator(x_ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:g}x"))
        decades = max(y_all) / min(y_all)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3e3 else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(
            FuncFormatter(
                lambda at, _: ("≤ " if floored and at <= FLOOR * 1.01 else "") + f"{at:g}"
            )
        )
        axes.grid(True, color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("compression of the KV bytes sent")
        axes.set_ylabel("KL to dense, nats a token")
        axes.set_title(_title(result), loc="left", fontsize=10, parse_math=False)
        figure.legend(
            handles, list(lines), loc="outside right upper", frameon=False, fontsize="small"
        )
        png, svg = (path_stem.with_name(path_stem.name + end) for end in (".png", ".svg"))
        png.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(png)
        figure.savefig(svg, metadata={"Date": None})
    return png, svg


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
    low = max((tick for tick in TICKS if tick <= min(values)), default=TICKS[0])
    high = min((tick for tick in TICKS if tick >= max(values)), default=TICKS[-1])
    return [tick for tick in TICKS if low <= tick <= high]


def _title(result: Result) -> str:
    p = result.provenance
    what = (
        f"{p.sequences} sequences of {p.text},"
        f" prompt {p.prompt_tokens} + continuation {p.continuation_tokens} tokens, {p.dtype}"
    )
    return "\n".join(line for text in (p.model, what) for line in textwrap.wrap(text, 100))
