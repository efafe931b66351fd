"""What the cost model predicts of pairs that were measured, and the table of both.

    python predict.py -o README.md    # from files of this repository alone
    python calibrate.py               # writes the kept files that it reads (AIConfigurator)

Four rows of the dense pair in pages of 128 tokens (``stock128``) say what AIConfigurator's tables
do not: how much slower vLLM's prefill and decode steps are, what a request spends outside the GPUs,
and the link. The layers' codec times are those of ``bench-transfer`` on its unpaced link, and a row
of ``bench-stages`` says what keys and values alone take. Nothing else is fitted, and no number that
was read is counted as predicted.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pdtrim.cost.fleet import Simulation
from pdtrim.cost.handover import CodecFile, Link
from pdtrim.cost.kept import CODECS, codec_files, stage_times
from pdtrim.cost.load import Requests
from pdtrim.cost.pair import PairCost, read_pair
from pdtrim.cost.queueing import station
from pdtrim.cost.service import Service
from pdtrim.kvfit.link import exposed

HERE = Path(__file__).parent
SERVED = HERE.parent / "serving_h200_202611" / "results.jsonl"
STAGE_ROWS = HERE.parent / "transfer_h100_202611" / "stages" / "result.json"
HANDOVERS = HERE.parent / "transfer_h100_202611" / "transfer" / "result.json"
CPU = HERE.parent / "handover_cpu_202611" / "result.json"
LAYERS, ANSWER, PROMPT = 32, 200, 8192
PROMPTS, RATES = (2048, 8192, 16384), (2, 3, 4, 5)
SYSTEMS = {"stock": 16, "stock128": 128, "pruned": 32, "coded": 32, "both": 32}
"""And the tokens of a page."""
TARGETS = ((0.6, 0.02), (0.4, 0.01))
READ = {("stock128", str(n)) for n in PROMPTS} | {("stock128", f"{PROMPT}@5")}
"""Rows that calibrate: what they have of the same quantity is no prediction."""
KV_ROW = ("prefill", 16)
"""Of ``bench-stages``: what ``KV_ALONE`` is from."""
GOAL = 0.1

Rows = dict[tuple[str, str], dict[str, Any]]


def served() -> Rows:
    """The measured rows by system and point."""
    rows = map(json.loads, SERVED.read_text(encoding="utf-8").splitlines())
    return {(row["system"], row["point"]): row for row in rows}


def arrivals(count: int, rate: float) -> list[float]:
    """When vLLM's ``bench serve`` sends its requests, by its seed, which ``serving.py`` sets."""
    drawn = np.random.RandomState(PROMPT + count).gamma(shape=1.0, scale=1 / rate, size=count)
    times = np.cumsum(drawn)
    return [float(at) for at in times * (count / rate / times[-1])]


def link(rows: Rows, page_tokens: int) -> Link:
    """Of two H200: what NIXL needs to post a page, and the bytes a second behind it."""
    one = {n: rows["stock128", str(n)]["handover"] for n in PROMPTS}
    behind = {n: one[n]["transfer_s"] - one[n]["post_s"] for n in PROMPTS}
    low, high = PROMPTS[0], PROMPTS[-1]
    speed = (one[high]["bytes"] - one[low]["bytes"]) / (behind[high] - behind[low])
    busy = rows["stock128", f"{PROMPT}@5"]["handover"]
    page_s = busy["post_s"] / (LAYERS * PROMPT / 128)
    return Link(gbit_s=speed * 8 / 1e9, page_tokens=page_tokens, page_s=page_s)


def services(rows: Rows) -> dict[str, Service]:
    """Each system as the cost model sees it."""
    times = stage_times("llama-3.1-8b", "h200_sxm", None)
    pairs = {name: PairCost.dense(LAYERS) for name in ("stock", "stock128")}
    pairs |= {name: read_pair(HERE / f"{name}.json") for name in ("pruned", "coded", "both")}
    files = codec_files((), "h100_sxm")
    return {
        name: Service(pair=pairs[name], times=times, link=link(rows, page), codecs=files)
        for name, page in SYSTEMS.items()
    }


@dataclass(frozen=True)
class Cell:
    """A number predicted and measured; ``read`` if the row's own number went into the model."""

    predicted: float
    measured: float
    read: bool = False

    @property
    def error(self) -> float:
        """A share of what was measured."""
        return self.predicted / self.measured - 1

    def text(self, scale: float, digits: int) -> str:
        """For a table; what is beyond the goal is bold, what was read is in brackets."""
        both = f"{self.predicted * scale:,.{digits}f} / {self.measured * scale:,.{digits}f}"
        error = f"{self.error:+.1%}"
        if self.read:
            return f"{both} ({error}, read)"
        return f"{both} **{error}**" if abs(self.error) > GOAL else f"{both} {error}"


def one_at_a_time(rows: Rows) -> dict[tuple[str, int], dict[str, Cell]]:
    """A request on an empty pair: seconds and bytes."""
    found = {}
    for (name, service), n in ((s, n) for s in services(rows).items() for n in PROMPTS):
        row, moved = rows[name, str(n)], service.handover(n)
        counted, read = row["handover"], name == "stock128"
        alone = Simulation(service, Requests(at=[0.0], lengths=[(n, ANSWER)]), 1)
        cells = {
            "ttft": Cell(alone.empty()[0], statistics.median(row["ttft_s"]), read),
            "tpot": Cell(service.step_s(1, n, ANSWER / 2), statistics.median(row["tpot_s"]), read),
            "bytes": Cell(moved.sent_bytes, counted["bytes"]),
            "transfer": Cell(moved.wire_s + moved.post_s, counted["transfer_s"], read),
        }
        if counted["handover_s"]:
            cells["handover"] = Cell(moved.wire_s + moved.held_s, counted["handover_s"])
        found[name, n] = cells
    return found


def under_load(rows: Rows, *, wait: bool = False) -> dict[tuple[str, int], dict[str, Cell]]:
    """Requests at a rate, at the load generator's own times.

    Args:
        wait: coded systems hear of a prompt's end behind the next prompt's forward, if there is
            one, as the measured code did.
    """
    found = {}
    for (name, service), rate in ((s, r) for s in services(rows).items() for r in RATES):
        row = rows[name, f"{PROMPT}@{rate}"]
        count, ours = row["requests"], not name.startswith("stock")
        at = arrivals(count, rate)
        run = Simulation(service, Requests(at=at, lengths=[(PROMPT, ANSWER)] * count), 64)
        if ours:  # the flaw of that benchmark: this prompt was cached
            run.prefill[0] = service.prefill_s(SYSTEMS[name])
        seen = run.run(1, 1)
        late = _heard_late(run) if wait and name in ("coded", "both") else [0.0] * count
        ttft = [a + b for a, b in zip(seen.ttft, late, strict=True)]
        lasted = max(a + b for a, b in zip(at, ttft, strict=True)) + ANSWER * seen.tpot
        clean = slice(int(ours), None)
        mine, theirs = ttft[clean], row["ttft_s"][clean]
        read = (name, f"{PROMPT}@{rate}") in READ
        cells = {
            "median": Cell(float(np.median(mine)), float(np.median(theirs)), read),
            "mean": Cell(float(np.mean(mine)), float(np.mean(theirs)), read),
            "p90": Cell(float(np.quantile(mine, 0.9)), float(np.quantile(theirs, 0.9)), read),
            "tpot": Cell(seen.tpot, float(np.mean(row["tpot_s"])), read),
            "post": Cell(service.handover(PROMPT).post_s, row["handover"]["post_s"], read),
        }
        if name in ("coded", "both"):
            del cells["post"]  # one read
        for first, token in TARGETS:
            good = sum(t <= first and seen.tpot <= token for t in ttft) / lasted
            answered = zip(row["ttft_s"], row["tpot_s"], strict=True)
            real = sum(t <= first and p <= token for t, p in answered) / row["seconds"]
            cells[f"good{first:g}"] = Cell(good, real, read)
        found[name, rate] = cells
    return found


def _heard_late(run: Simulation) -> list[float]:
    begun = station(run.arrivals, run.prefill, 1)
    ends = [start + s for start, s in zip(begun, run.prefill, strict=True)]
    queued = [b <= e + 1e-9 for b, e in zip(begun[1:], ends, strict=False)]
    return [b - a if q else 0.0 for a, b, q in zip(ends, ends[1:], queued, strict=False)] + [0.0]


def stages() -> list[tuple[str, int, Cell, Cell]]:
    """``bench-stages`` on an H100: by the kept times, and from its own row without removal."""
    data = json.loads(STAGE_ROWS.read_text(encoding="utf-8"))
    times, n = stage_times("llama-3.1-8b", "h100_sxm", None), data["tokens"]
    whole: dict[str, float] = {}
    found = []
    for row in data["rows"]:
        gone, stage = row["removed"], row["stage"]
        left, dense = LAYERS - gone, PairCost.dense(LAYERS)
        if stage == "prefill":
            pair = replace(dense, attention=left, mlp=left, kv_only=gone)
        else:
            pair = replace(dense, decode_attention=left, decode_mlp=left, sent=dense.sent[:left])
        service = Service(pair=pair, times=times, link=Link(gbit_s=1.0), codecs=())
        made = service.prefill_s(n) if stage == "prefill" else service.step_s(1, n, 0)
        measured = row["seconds"]["median"]
        whole.setdefault(stage, measured / made)
        read = not gone or (stage, gone) == KV_ROW
        scaled = Cell(made * whole[stage], measured, read)
        found.append((stage, gone, Cell(made, measured), scaled))
    return found


def handovers() -> Iterator[tuple[str, str, dict[str, Cell]]]:
    """``bench-transfer`` on one H100: one after the other, and exposed behind prefill."""
    data = json.loads(HANDOVERS.read_text(encoding="utf-8"))
    raw, layer_s = data["raw_bytes"], data["prefill_s"]["median"] / LAYERS
    speeds = layer_speeds(data)
    whole = CodecFile.load(CODECS / "bench_256_3824_128.json").speeds
    for row in data["rows"]:
        name, bytes_sent = row["name"], float(row["bytes"])
        codec = name.removeprefix("full+")
        if codec in whole:
            bytes_sent = raw / whole[codec].compression
        gbit = 8 * data["copy_gb_s"] if not row["paced"] else float(row["link"].split()[0])
        move, (encode, decode) = bytes_sent * 8 / (gbit * 1e9), speeds.get(name, (0.0, 0.0))
        cells = {"bytes": Cell(bytes_sent, row["bytes"], codec not in whole and "full" not in name)}
        in_turn = encode + move + decode
        cells["in turn"] = Cell(in_turn, row["in_turn_s"]["median"], not row["paced"])
        behind = exposed(
            *(part / LAYERS for part in (encode, move, decode)), layers=LAYERS, layer_s=layer_s
        )
        blocking = name.startswith("bf16")
        if name != "paper's rule":  # whose layers are not alike
            cells["exposed"] = Cell(in_turn if blocking else behind, row["exposed_s"]["median"])
        if "by pages" not in name:  # launches of a Python loop, which nothing models
            yield row["link"], name, cells


def layer_speeds(data: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Seconds in and out of a way to send; the rows of the measured link, which are read."""
    rows = (row for row in data["rows"] if not row["paced"])
    return {r["name"]: (r["encode_s"]["median"], r["decode_s"]["median"]) for r in rows}


def on_cpu() -> Iterator[tuple[str, Cell]]:
    """SmolLM2 on two cores: a handover beside prefill, from the one behind it, which is read."""
    rows = json.loads(CPU.read_text(encoding="utf-8"))["rows"]
    behind = {r["codec"]: r["exposed_ms"]["median"] for r in rows if r["handover"] == "blocking"}
    for row in rows:
        if row["handover"] == "overlapped":
            yield row["codec"], Cell(behind[row["codec"]] / 30, row["exposed_ms"]["median"])


def table(head: str, lines: Iterable[Iterable[str]]) -> str:
    """In Markdown; the first two columns name the row."""
    rule = "|".join(["---"] * head.count("|")) + "|---"
    return "\n".join([f"| {head} |", f"|{rule}|", *(f"| {' | '.join(x)} |" for x in lines)]) + "\n"


def cells(of: dict[str, Cell], *shown: tuple[str, float, int]) -> list[str]:
    """Cells by name, scale and digits; a dash for what is not there."""
    return [of[key].text(scale, digits) if key in of else "-" for key, scale, digits in shown]


def summary(groups: dict[str, list[Cell]]) -> str:
    """How many predictions are within the goal, by what is predicted."""
    lines = []
    for name, found in groups.items():
        errors = [abs(cell.error) for cell in found if not cell.read]
        within = sum(error <= GOAL for error in errors)
        middle = statistics.median(errors)
        lines.append([name, str(len(errors)), str(within), f"{middle:.1%}", f"{max(errors):.1%}"])
    return table("predicted | rows | within 10 % | median error | largest", lines)


def report() -> str:
    """The page, from the words in ``page.md`` and the numbers of today's model."""
    rows = served()
    alone, loads, waited = (
        one_at_a_time(rows),
        under_load(rows),
        {k: v for k, v in under_load(rows, wait=True).items() if k[0] in ("coded", "both")},
    )
    raw = {k: v for k, v in loads.items() if k[0] not in ("coded", "both")}
    moved, ran, cpu = list(handovers()), stages(), list(on_cpu())
    load_columns = (
        *((key, 1e3, 0) for key in ("median", "mean", "p90")),
        ("tpot", 1e3, 2), ("post", 1e3, 1), ("good0.6", 1, 2), ("good0.4", 1, 2),
    )  # fmt: skip
    load_head = (
        "system | requests/s | TTFT median, ms | mean, ms | p90, ms | TPOT, ms | posting, ms"
        " | goodput 600/20 | 400/10"
    )

    def of(found: Iterable[dict[str, Cell]], *keys: str) -> list[Cell]:
        return [one[key] for one in found for key in keys if key in one]

    groups = {
        "TTFT, one request": of(alone.values(), "ttft"),
        "TPOT, one request": of(alone.values(), "tpot"),
        "bytes of a handover": of(alone.values(), "bytes"),
        "transfer by NIXL's clock": of(alone.values(), "transfer"),
        "handover of ours": of(alone.values(), "handover"),
        "TTFT under load (median, mean, p90), raw KV": of(raw.values(), "median", "mean", "p90"),
        "the same, coded KV": of((loads[k] for k in waited), "median", "mean", "p90"),
        "the same, with the wait that the code had": of(waited.values(), "median", "mean", "p90"),
        "posting under load, raw KV": of(raw.values(), "post"),
        "TPOT under load": of(loads.values(), "tpot"),
        "goodput, raw KV": of(raw.values(), "good0.6", "good0.4"),
        "goodput, coded KV, with the wait": of(waited.values(), "good0.6", "good0.4"),
        "stages on an H100, kept times": [kept for _, _, kept, _ in ran],
        "stages, from the row without removal": [scaled for *_, scaled in ran],
        "handover one after the other, paced": of((c for *_, c in moved), "in turn"),
        "handover exposed": of((c for *_, c in moved), "exposed"),
        "handover beside prefill on two cores": [cell for _, cell in cpu],
    }
    parts = {
        "SUMMARY": summary(groups),
        "ALONE": table(
            "prompt | system | TTFT, ms | TPOT, ms | bytes, MB | transfer, ms | handover, ms",
            (
                [f"{n:,}", name, *cells(
                    alone[name, n], ("ttft", 1e3, 0), ("tpot", 1e3, 2), ("bytes", 1e-6, 1),
                    ("transfer", 1e3, 1), ("handover", 1e3, 1),
                )]
                for n in PROMPTS for name in SYSTEMS
            ),
        ),
        "LOAD": table(
            load_head,
            ([name, str(rate), *cells(loads[name, rate], *load_columns)]
             for rate in RATES for name in SYSTEMS),
        ),
        "WAIT": table(
            load_head,
            ([name, str(rate), *cells(one, *load_columns)] for (name, rate), one in waited.items()),
        ),
        "STAGES": table(
            "stage | blocks removed | kept times, ms | from the row of 0, ms",
            ([stage, str(gone), kept.text(1e3, 2), scaled.text(1e3, 2)]
             for stage, gone, kept, scaled in ran),
        ),
        "HANDOVERS": table(
            "link | handover | bytes, MB | one after the other, us | exposed, us",
            ([where, name, *cells(one, ("bytes", 1e-6, 1), ("in turn", 1e6, 0),
                                  ("exposed", 1e6, 0))]
             for where, name, one in moved),
        ),
        "CPU": table(
            "codec | of | exposed beside prefill, ms",
            ([codec, "500 tokens", cell.text(1, 1)] for codec, cell in cpu),
        ),
    }  # fmt: skip
    page = (HERE / "page.md").read_text(encoding="utf-8")
    for name, text in parts.items():
        assert page.count(f"<!-- {name} -->\n") == 1, name
        page = page.replace(f"<!-- {name} -->\n", text)
    return page


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.parse_args().output.write_text(report(), encoding="utf-8")


if __name__ == "__main__":
    main()
