"""A comparison as Markdown, as a table on a terminal, and as a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from pdtrim.errors import PdtrimError
from pdtrim.evaluate.compare.records import Comparison, SystemRow
from pdtrim.evaluate.compare.systems import SETTINGS
from pdtrim.evaluate.statistics import Interval
from pdtrim.report.figure import new_figure, save_figure

NONE = "-"
"""What stands where a number is missing."""

# Okabe and Ito's colours, told apart with any colour vision
COLOURS = {"ours": "#0072B2", "paper": "#D55E00", "mixed": "#009E73", "others": "#9A9A9A"}
LABELS = {
    "ours": "pdtrim",
    "paper": "PDTrim as reconstructed",
    "mixed": "a baseline with pdtrim",
    "others": "baselines",
}


def blocks(result: Comparison) -> Iterator[tuple[str, list[SystemRow]]]:
    """Title and rows of each part of the table, without empty parts; the dense row is in none."""
    for setting in SETTINGS:
        for trained in (False, True):
            rows = [r for r in result.rows if (r.setting, r.trained) == (setting, trained)]
            if rows:
                yield f"{setting}, {'trained' if trained else 'training-free'}", rows


def markdown(result: Comparison) -> str:
    """One table a setting, training-free systems before trained ones, the dense model on top."""
    lines = [_caption(result), ""]
    names = [info.task for info in result.tasks if info.main != "ppl"]
    texts = [info.task for info in result.tasks if info.main == "ppl"]
    head = ["system", "removed P / D %", *names, "average", "% of dense"]
    head += [f"to {result.best_baseline or 'the best baseline'} [95 %]"]
    head += [f"{text} ppl" for text in texts]
    head += ["KV", "P time", "D time", "search"]
    for title, rows in blocks(result):
        lines += [f"## {title[0].upper()}{title[1:]}", ""]
        lines += [_line(head), "|---|" + "---:|" * (len(head) - 1)]
        for row in (result.dense, *rows):
            if row.failed:
                reason = f"not made: {row.failed}".replace("|", "\\|")
                lines.append(_line([row.name, reason, *[""] * (len(head) - 2)]))
                continue
            lines.append(
                _line(
                    [
                        row.name,
                        _removed(row),
                        *(_percent(row.scores.get(name)) for name in names),
                        _average(row),
                        _percent(row.of_dense),
                        _to_baseline(row, result),
                        *(_number(row.ppl.get(text), ".2f") for text in texts),
                        *_costs(row),
                    ]
                )
            )
        lines.append("")
    lines += _notes(result)
    return "\n".join(lines) + "\n"


def table(result: Comparison) -> Group:
    """What people compare first, without the single tasks: a table a setting."""
    parts: list[Table | str] = [_caption(result), ""]
    width = max(len(row.name) for row in result.rows)
    for title, rows in blocks(result):
        view = Table(
            title=title,
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        view.add_column("", no_wrap=True, min_width=width)
        for name in ("removed", "average", f"to {result.best_baseline or 'baseline'}", "KV"):
            view.add_column(name, justify="right", overflow="fold")
        view.add_column("time", justify="right", no_wrap=True)
        for row in (result.dense, *rows):
            if row.failed:
                view.add_row(row.name, "not made")
                continue
            kv, prefill, decode, _ = _costs(row)
            removed, to_best = _removed(row, "/"), _to_baseline(row, result)
            average = _percent(row.average.mean if row.average else None)
            view.add_row(row.name, removed, average, to_best, kv, f"{prefill}/{decode}")
        parts.append(view)
    parts.append(
        "in %: removed parameters (prefill/decode), average, difference of averages [95 %]\n"
        "KV: dense bytes over bytes sent; time: prefill and decode over the dense model's"
    )
    return Group(*parts)


def plot_compare(result: Comparison, path: Path) -> Path:
    """Write a PNG: averages with their intervals, a bar a system, the dense model as a line.

    Raises:
        PdtrimError: no system has an average, or matplotlib is missing.
    """
    parts = [
        (title, sorted(shown, key=lambda row: row.average.mean, reverse=True))  # type: ignore[union-attr]
        for title, rows in blocks(result)
        if (shown := [row for row in rows if row.average])
    ]
    if not parts:
        raise PdtrimError("nothing to plot: no system has an average")
    count = sum(len(rows) for _, rows in parts)
    figure = new_figure(9, 1.6 + 0.32 * count + 0.5 * len(parts))
    ratios = [len(rows) + 0.6 for _, rows in parts]
    grid: Any = figure.subplots(
        len(parts), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": ratios}
    )
    drawn = [result.dense, *(row for _, rows in parts for row in rows)]
    right = max(row.average.high for row in drawn if row.average)
    for axes, (title, rows) in zip(grid[:, 0], parts, strict=True):
        _bars(axes, rows, 100 * right)
        axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
        if result.dense.average:
            axes.axvline(100 * result.dense.average.mean, color="black", linewidth=1, ls="--")
    last = grid[-1, 0]
    last.set_xlim(0, 112 * right)
    last.set_xlabel("average of the tasks, %, with the 95 % interval over items")
    figure.suptitle(
        "\n".join(textwrap.wrap(_caption(result), 100)),
        x=0.01,
        ha="left",
        fontsize=10,
        parse_math=False,
    )
    _legend(figure, parts, result)
    return save_figure(figure, path)


def _bars(axes: Any, rows: list[SystemRow], right: float) -> None:
    """One part's bars from the top down, each with its number at the right edge."""
    for place, row in enumerate(rows):
        assert row.average
        mean, low, high = (100 * x for x in (row.average.mean, row.average.low, row.average.high))
        axes.barh(
            place,
            mean,
            height=0.7,
            color=COLOURS[_kind(row)],
            xerr=[[mean - low], [high - mean]],
            error_kw={"elinewidth": 0.9, "capsize": 2.5, "ecolor": "#303030"},
        )
        axes.text(1.03 * right, place, f"{mean:.1f}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8, parse_math=False)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(True, axis="x", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Any, parts: list[tuple[str, list[SystemRow]]], result: Comparison) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    there = {_kind(row) for _, rows in parts for row in rows}
    handles: list[Any] = [Patch(color=COLOURS[k], label=LABELS[k]) for k in COLOURS if k in there]
    if result.dense.average:
        mean = 100 * result.dense.average.mean
        handles.append(Line2D([], [], color="black", lw=1, ls="--", label=f"dense, {mean:.1f}"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False
    )


def _kind(row: SystemRow) -> str:
    if "+" in row.method:
        return "mixed"
    return {"pdtrim": "ours", "paper": "paper"}.get(row.method, "others")


def _caption(result: Comparison) -> str:
    sources = ", ".join(sorted({info.source for info in result.tasks}))
    seeds = sorted({run.seed for row in result.rows[1:] for run in row.runs})
    return (
        f"{result.model}, {result.dtype}: {result.remove:.0%} of the blocks' parameters removed;"
        f" {len(result.tasks)} tasks of {sources}, {_items(result)} items;"
        f" seeds {', '.join(map(str, seeds)) or 'none'}"
    )


def _items(result: Comparison) -> int:
    return sum(info.count for info in result.tasks)


def _notes(result: Comparison) -> list[str]:
    """Below the tables: what the columns mean, and why seeds are missing."""
    lines = [
        "Accuracies in %. Removed: measured share of the blocks' parameters that prefill (P) and"
        " decode (D) lost. KV: dense bytes a prompt over bytes sent. P time, D time: over the"
        " dense model's. Search: block-tokens of making the plan. With several seeds an average"
        " has its least and greatest seed behind it.",
    ]
    for row in result.rows:
        lines += [
            f"- {row.name}, seed {run.seed}: not made, {run.failed}"
            for run in row.runs
            if run.failed and not row.failed
        ]
    return lines


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _removed(row: SystemRow, between: str = " / ") -> str:
    return f"{100 * row.prefill_removed:.1f}{between}{100 * row.decode_removed:.1f}"


def _average(row: SystemRow) -> str:
    if row.average is None or row.spread is None:
        return NONE
    low, high = row.spread
    made = sum(run.failed is None for run in row.runs)
    spread = f" ({100 * low:.1f} .. {100 * high:.1f})" if made > 1 else ""
    return _percent(row.average.mean) + spread


def _to_baseline(row: SystemRow, result: Comparison) -> str:
    if row.name == result.best_baseline:
        return "best"
    return _difference(row.to_baseline)


def _difference(interval: Interval | None) -> str:
    if interval is None:
        return NONE
    mean, low, high = (100 * x for x in (interval.mean, interval.low, interval.high))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def _costs(row: SystemRow) -> tuple[str, str, str, str]:
    return (
        _number(row.kv_compression, ".2f", "x"),
        _number(row.prefill_time, ".2f"),
        _number(row.decode_time, ".2f"),
        f"{row.search_block_tokens / 1e6:.1f} M" if row.search_block_tokens else NONE,
    )


def _percent(share: float | None) -> str:
    return _number(None if share is None else 100 * share, ".1f")


def _number(value: float | None, form: str, unit: str = "") -> str:
    return NONE if value is None else f"{value:{form}}{unit}"
