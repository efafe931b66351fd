"""Timed handovers and stages as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def transfer_table(report: Mapping[str, Any]) -> str:
    """What :func:`pdtrim.bench.transfer.bench_transfer` returns, a table a link."""
    copy, prefill = report["copy_s"], report["prefill_s"]
    lines = [
        f"{report['shape']}: {report['tokens']} tokens, {report['layers']} layers,"
        f" {report['kv_heads']} KV heads of {report['width']}, {report['dtype']},"
        f" {report['raw_bytes'] / 1e6:.1f} MB, on {_place(report)}.",
        "",
        f"A plain copy is {report['copy']}: {_us(copy)} us, {report['copy_gb_s']:.1f} GB/s."
        f" Prefill alone takes {_us(prefill)} us. Medians of {report['repeats']} rounds (least to"
        " most). *In turn* is encoding, moving and decoding with nothing beside them; *exposed* is"
        " from the end of prefill until decode has every layer, each layer handed over while the"
        " next ones compute, but for blocking rows.",
    ]
    if report["transport"] == "nixl":
        lines += [
            "",
            "Measured moves go by NIXL into another process, one descriptor a layer (a page and"
            " layer where a row says pages), each timed by itself; exposed times are reckoned from"
            " them.",
        ]
    if report["slow_link"]:
        lines += ["", f"{report['slow_link']}."]
    for link in dict.fromkeys(row["link"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["link"] == link]
        paced = ": moves last as long as their bytes at that speed" if rows[0]["paced"] else ""
        lines += [
            "",
            f"Link: {link}{paced}.",
            "",
            "| handover | Gbit | encode us | move us | decode us | in turn us | exposed us"
            " | prefill slower | GB/s | of a copy |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [_transfer_row(row) for row in rows]
    return "\n".join(lines) + "\n"


def _transfer_row(row: Mapping[str, Any]) -> str:
    parts = ("encode_s", "move_s", "decode_s", "in_turn_s", "exposed_s")
    slower = row["prefill_slower"]
    cells = [
        row["name"],
        f"{row['gbit']:.3g}",
        *(_us(row[part]) for part in parts),
        f"{slower['median']:+.1%} ({slower['least']:+.1%} to {slower['most']:+.1%})",
        f"{row['gb_s']:.1f}",
        f"{row['share_of_copy']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def stages_table(report: Mapping[str, Any]) -> str:
    """What :func:`pdtrim.bench.removal.bench_stages` returns."""
    lines = [
        f"{report['shape']}: a prompt of {report['tokens']} tokens, and one token decoded behind"
        f" it; random weights, {report['dtype']}, {report['code']}, on {_place(report)}. Medians"
        f" of {report['repeats']} rounds (least to most). Blocks that prefill loses still make"
        " keys and values.",
        "",
        "| stage | blocks removed | operations removed | ms | faster | faster by operations |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        taken, faster = row["seconds"], row["faster"]
        lines.append(
            f"| {row['stage']} | {row['removed']} of {report['layers']}"
            f" | {row['flops_removed']:.1%}"
            f" | {taken['median'] * 1e3:.2f} ({taken['least'] * 1e3:.2f} to"
            f" {taken['most'] * 1e3:.2f})"
            f" | {faster['median']:.2f}x ({faster['least']:.2f} to {faster['most']:.2f})"
            f" | {row['flops_faster']:.2f}x |"
        )
    return "\n".join(lines) + "\n"


def _place(report: Mapping[str, Any]) -> str:
    """The hardware, or how many threads of a CPU."""
    return report["hardware"] or f"a CPU, {report['threads']} threads"


def _us(span: Mapping[str, float]) -> str:
    """Microseconds."""
    median, least, most = (span[key] * 1e6 for key in ("median", "least", "most"))
    return "0" if most == 0 else f"{median:.0f} ({least:.0f} to {most:.0f})"
