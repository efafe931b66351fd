"""Runs that measure time and bytes: ``bench-codec``, ``bench-transfer``, ``bench-stages``, vLLM."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from pdtrim.cost.handover import CodecSpeed
from pdtrim.records import Part
from pdtrim.report.page.record import Run, Sent, Source, Table
from pdtrim.report.page.results import machine

MEASURED = "measured"


class _Times(Part):
    median: float = Field(ge=0)


class _Move(Part):
    link: str
    name: str
    bytes: float = Field(ge=0)
    encode_s: _Times
    decode_s: _Times


class _Transfer(Part):
    shape: str
    tokens: int
    hardware: str
    dtype: str
    transport: str
    prefill_s: _Times
    rows: tuple[_Move, ...]


class _Stage(Part):
    stage: Literal["prefill", "decode"]
    removed: int
    seconds: _Times
    faster: _Times
    flops_faster: float


class _Stages(Part):
    shape: str
    tokens: int
    hardware: str
    dtype: str
    code: str
    rows: tuple[_Stage, ...]


class _Codecs(Part):
    raw_bytes: int = Field(gt=0)
    hardware: str
    dtype: str
    codecs: tuple[CodecSpeed, ...]


class _Pull(Part):
    prompt_tokens: int
    connector: str
    bytes: float
    descriptors: float
    post_s: float
    transfer_s: float


class _Pulls(Part):
    versions: dict[str, str]
    host: dict[str, str | int]
    rows: tuple[_Pull, ...]


def transfer(path: str, data: Any) -> Run:
    """Of ``bench-transfer``: its rows on the link that was measured, their codecs' times."""
    found = _Transfer.model_validate(data)
    sent = [
        Sent(
            name=row.name,
            sent_bytes=row.bytes,
            encode_s=row.encode_s.median,
            decode_s=row.decode_s.median,
        )
        for row in found.rows
        if row.link == MEASURED
    ]
    facts = (
        ("shape", f"{found.shape}, {found.tokens:,} tokens, {found.dtype}"),
        ("dense prefill of the prompt", f"{found.prefill_s.median:.4f} s"),
        ("hardware", f"{found.hardware}, {found.transport}"),
    )
    command = "pdtrim bench-transfer --json"
    source = Source(path=path, kind="bench-transfer", facts=facts, command=command)
    return Run(source=source, sent=tuple(sent))


def codecs(path: str, data: Any) -> Run:
    """Of ``bench-codec``."""
    found = _Codecs.model_validate(data)
    raw = found.raw_bytes
    sent = [Sent(name="raw", sent_bytes=raw, encode_s=0.0, decode_s=0.0)] + [
        Sent(
            name=speed.codec,
            sent_bytes=raw / speed.compression,
            encode_s=raw / (speed.encode_gb_s * 1e9),
            decode_s=raw / (speed.decode_gb_s * 1e9),
        )
        for speed in found.codecs
    ]
    facts = (
        ("cache", f"{raw:,} bytes of random data, {found.dtype}"),
        ("hardware", found.hardware),
    )
    source = Source(path=path, kind="bench-codec", facts=facts, command="pdtrim bench-codec --json")
    return Run(source=source, sent=tuple(sent))


def stages(path: str, data: Any) -> Run:
    """Of ``bench-stages``."""
    found = _Stages.model_validate(data)
    rows = [
        (
            f"{row.stage}, {row.removed} removed",
            f"{row.seconds.median * 1e3:.2f}",
            f"{row.faster.median:.2f}",
            f"{row.flops_faster:.2f}",
        )
        for row in found.rows
    ]
    table = Table(
        title=f"Stage times of {found.shape}, {found.tokens:,} tokens",
        columns=("stage and blocks", "ms", "times faster", "times fewer operations"),
        rows=tuple(rows),
        note=f"{found.hardware}, {found.dtype}, {found.code}.",
    )
    facts = (("shape", f"{found.shape}, {found.dtype}"), ("hardware", found.hardware))
    source = Source(
        path=path, kind="bench-stages", facts=facts, command="pdtrim bench-stages --json"
    )
    return Run(source=source, tables=(table,))


def pulls(path: str, data: Any) -> Run:
    """Of a handover's measurement on vLLM."""
    found = _Pulls.model_validate(data)
    rows = [
        (
            f"{row.prompt_tokens:,} tokens, {row.connector}",
            f"{row.bytes / 1e6:.2f}",
            f"{row.descriptors:,.0f}",
            f"{row.post_s * 1e3:.2f}",
            f"{row.transfer_s * 1e3:.2f}",
        )
        for row in found.rows
    ]
    table = Table(
        title="Handovers between two vLLM servers",
        columns=("prompt and connector", "MB", "descriptors", "post, ms", "transfer, ms"),
        rows=tuple(rows),
    )
    facts = tuple(machine(found.versions, found.host))
    command = "python benchmarks/handover_vllm_202611/measure.py"
    source = Source(path=path, kind="handover on vLLM", facts=facts, command=command)
    return Run(source=source, tables=(table,))
