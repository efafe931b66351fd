"""Runs that measure quality: ``eval``, ``eval --tasks``, ``kv-sweep``, ``demo``, ``compare``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from pdtrim.evaluate.compare.records import Comparison, SystemRow
from pdtrim.evaluate.result import Result, Row
from pdtrim.evaluate.statistics import Interval, paired_difference
from pdtrim.evaluate.tasks.result import SEED, TasksResult
from pdtrim.report.page.record import Bar, Run, Sent, Source, Table

POINTS = 100


def text_result(path: str, data: Any) -> Run:
    """Of ``pdtrim.result/1``."""
    result = Result.model_validate(data)
    p = result.provenance
    answers = [(row.name, row.answer) for row in result.rows if row.answer is not None]
    lengths = f"--prompt-tokens {p.prompt_tokens} --continuation-tokens {p.continuation_tokens}"
    many = f"{shlex.quote(p.text)} {lengths} --limit {p.sequences}"
    if answers and any(row.settings for row in result.rows):
        kind, command = "demo", "pdtrim demo -o FOLDER"
    elif any(row.settings == "dense" for row in result.rows):
        kind, command = (
            "kv-sweep",
            f"pdtrim kv-sweep {shlex.quote(p.model)} --text {many} -o FOLDER",
        )
    else:
        asked = " --ask PROMPT" if answers else ""
        kind, command = "eval", f"pdtrim eval PLAN --text {many}{asked} -o RESULT"
    facts = (
        *_model(p.model, p.model_fingerprint, p.dtype),
        ("text", f"{p.sequences} sequences of {p.text}"),
        ("tokens", f"prompt {p.prompt_tokens}, continuation {p.continuation_tokens}"),
        ("calibration", f"{p.calibration or 'none'} {(p.calibration_hash or '')[:16]}".strip()),
        ("seed", "not recorded" if p.seed is None else str(p.seed)),
        ("plan digests", digests(p.plan_digests)),
        *machine(p.versions, p.host),
    )
    return Run(
        source=Source(path=path, kind=kind, facts=facts, command=command),
        sent=tuple(_sent(row) for row in result.rows),
        answers=tuple(answers),
        problems=result.problems,
    )


def _sent(row: Row) -> Sent:
    return Sent(
        name=row.name,
        sent_bytes=row.kv_bytes,
        kl=row.kl,
        kl_error=row.kl_error,
        blocks=f"{row.prefill_blocks} / {row.decode_blocks}",
    )


def tasks_result(path: str, data: Any) -> Run:
    """Of ``pdtrim.tasks/1``."""
    result = TasksResult.model_validate(data)
    dense, plan = result.rows
    rows, bars = [], []
    for task, ours in plan.tasks.items():
        theirs, main = dense.tasks[task], ours.main
        scale = 1.0 if main == "ppl" else POINTS
        gap: Interval | None = None
        if ours.count > 1 and ours.items_hash == theirs.items_hash:
            a, b = ([scale * value for value in row.items[main]] for row in (ours, theirs))
            gap = paired_difference(a, b, seed=SEED)
            if scale == POINTS:
                bars.append(Bar(name=task, mean=gap.mean, low=gap.low, high=gap.high))
        values = (f"{row.metrics[main] * scale:.1f}" for row in (theirs, ours))
        rows.append((task, main, str(ours.count), *values, interval(gap, sign=True)))
    table = Table(
        title="Tasks, the plan beside the dense model",
        columns=("task", "metric", "items", dense.name, plan.name, "difference [95 %]"),
        rows=tuple(rows),
        note="Metrics in %, differences in points on the same items; of ppl, differences are of the"
        " NLL in nats a token.",
    )
    facts = (
        *_model(result.model, result.model_fingerprint, result.dtype),
        ("plan digest", result.plan_digest),
        ("device", result.device),
        *machine(result.versions, result.host),
    )
    command = f"pdtrim eval PLAN --tasks {shlex.quote(','.join(plan.tasks))} -o RESULT"
    return Run(
        source=Source(path=path, kind="eval --tasks", facts=facts, command=command),
        tables=(table,),
        bars=tuple(bars),
        bars_unit="plan minus dense, points",
    )


def comparison(path: str, data: Any) -> Run:
    """Of ``pdtrim.compare/1``."""
    found = Comparison.model_validate(data)
    done = [row for row in found.rows if row.failed is None]
    bars = [
        Bar(name=_system(row), mean=POINTS * a.mean, low=POINTS * a.low, high=POINTS * a.high)
        for row in done
        if (a := row.average) is not None
    ]
    average = Table(
        title=f"Methods at {found.remove:.0%} of the blocks' parameters removed",
        columns=(
            "system", "removed P / D, %", "average [95 %], %", "to dense [95 %], points",
            "KV, times smaller", "P time", "D time",
        ),
        rows=tuple(_system_cells(row) for row in found.rows),
        note="P and D: prefill and decode; times are over the dense model's. Best training-free"
        f" baseline: {found.best_baseline or 'none'}.",
    )  # fmt: skip
    names = [info.task for info in found.tasks]
    each = Table(
        title="The same systems task by task",
        columns=("system", *names),
        rows=tuple((_system(row), *(_score(row, name) for name in names)) for row in done),
        note="Main metric in %; of perplexities, the perplexity.",
    )
    plans = [run.plan_digest for row in found.rows for run in row.runs if run.plan_digest]
    facts = (
        *_model(found.model, found.model_fingerprint, found.dtype),
        ("device", found.device),
        ("calibration", str(found.settings.get("calibration", "not recorded"))),
        ("seeds", listed(found.settings.get("seeds"))),
        ("plan digests", digests(plans)),
        *machine(found.versions, found.host),
    )
    return Run(
        source=Source(path=path, kind="compare", facts=facts, command=_compare_command(found)),
        tables=(average, each),
        bars=tuple(bars),
        bars_unit="average of the tasks, %",
    )


def _compare_command(found: Comparison) -> str:
    words = ["pdtrim", "compare", found.model, "--remove", f"{found.remove:g}"]
    for name in ("methods", "tasks", "data", "limit", "seeds", "calibration", "sequences"):
        if (value := found.settings.get(name)) is not None:
            words += [f"--{name}", listed(value)]
    return f"{shlex.join(words)} -o FOLDER"


def _system(row: SystemRow) -> str:
    return row.name if row.setting is None else f"{row.name} ({row.setting})"


def _system_cells(row: SystemRow) -> tuple[str, ...]:
    if row.failed is not None:
        return (_system(row), f"failed: {row.failed}", *[""] * 5)
    return (
        _system(row),
        f"{POINTS * row.prefill_removed:.1f} / {POINTS * row.decode_removed:.1f}",
        interval(row.average, POINTS),
        interval(row.to_dense, POINTS, sign=True),
        number(row.kv_compression, ".2f"),
        number(row.prefill_time, ".2f"),
        number(row.decode_time, ".2f"),
    )


def _score(row: SystemRow, task: str) -> str:
    if task in row.scores:
        return f"{POINTS * row.scores[task]:.1f}"
    return number(row.ppl.get(task), ".1f")


def interval(of: Interval | None, scale: float = 1.0, *, sign: bool = False) -> str:
    """A mean and its bounds; a dash for none."""
    if of is None:
        return "-"
    form = "+.1f" if sign else ".1f"
    mean, low, high = (format(scale * x, form) for x in (of.mean, of.low, of.high))
    return f"{mean} [{low}, {high}]"


def number(value: float | None, form: str) -> str:
    """A dash for none."""
    return "-" if value is None else format(value, form)


def listed(value: Any) -> str:
    """A list as an option takes it."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def digests(all_of_them: Any) -> str:
    """The one, or how many there are and the first."""
    unique = list(dict.fromkeys(all_of_them))
    if len(unique) < 2:
        return unique[0] if unique else "none"
    return f"{len(unique)}, the first {unique[0]}"


def machine(versions: Mapping[str, str], host: Mapping[str, str | int]) -> list[tuple[str, str]]:
    """Versions and hardware, as the run records them."""
    return [
        ("versions", ", ".join(f"{name} {which}" for name, which in versions.items())),
        ("hardware", ", ".join(f"{name} {which}" for name, which in host.items())),
    ]


def _model(name: str, fingerprint: str, dtype: str) -> list[tuple[str, str]]:
    return [("model", f"{name}, {dtype}"), ("model fingerprint", fingerprint)]
