"""Evaluate a plan file or an exported pair on held-out text: what ``pdtrim eval`` does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pdtrim.bundle import TrimPlan
from pdtrim.calibration.batches import text_batch
from pdtrim.errors import PdtrimError
from pdtrim.evaluate.handover import measured_plan_bytes
from pdtrim.evaluate.kv_suite import KvSuiteConfig, run_suite
from pdtrim.evaluate.quality import measure_quality
from pdtrim.evaluate.result import Result, make_provenance, make_row
from pdtrim.exported import base_model
from pdtrim.progress import Progress, silent
from pdtrim.stage.cost import Lengths
from pdtrim.stage.forward import Trimmed

WIRE_PROMPTS = 4  # prompts whose handover is counted; their lengths are equal


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What to measure on; ``probes`` a task of the KV suite, 0 to leave it out."""

    text: str
    prompt_tokens: int = 512
    continuation_tokens: int = 256
    limit: int = 16
    dtype: str = "bfloat16"
    device: str = "cpu"
    model: str | None = None
    probes: int = 0

    def __post_init__(self) -> None:
        if min(self.prompt_tokens, self.continuation_tokens, self.limit) < 1:
            raise PdtrimError("prompt tokens, continuation tokens and limit must be at least 1")


def evaluate_text(target: str | Path, config: EvalConfig, *, progress: Progress = silent) -> Result:
    """Rows ``dense`` and the plan's method, on the same tokens.

    Args:
        target: a plan file, or a folder that ``export`` wrote.

    Raises:
        PdtrimError: unreadable plan, pair, model or text.
    """
    trim = TrimPlan.open(target)
    plan, name = trim.plan, trim.name
    model = base_model(plan, source=config.model, dtype=config.dtype, device=config.device)
    batch = text_batch(
        model,
        config.text,
        prompt_tokens=config.prompt_tokens,
        continuation_tokens=config.continuation_tokens,
        limit=config.limit,
    )
    trimmed = Trimmed.of(plan, trim.pair(model))
    qualities = measure_quality(
        model,
        {"dense": Trimmed.dense(model), name: trimmed},
        batch,
        progress=progress,
    )
    metrics: dict[str, dict[str, float]] = {"dense": {}, name: {}}
    if config.probes:
        suite = KvSuiteConfig(probes=config.probes, tokens=config.prompt_tokens)
        metrics["dense"] = run_suite(Trimmed.dense(model), {}, suite, progress)["full"]
        metrics[name] = run_suite(trimmed, {name: trimmed.policy}, suite, progress)[name]
    prompts = batch[:WIRE_PROMPTS]
    with progress("counting bytes on the wire", 2) as advance:
        dense_bytes = measured_plan_bytes(TrimPlan.dense(model), model, prompts)
        advance(1)
        sent = measured_plan_bytes(trim, model, prompts)
        advance(1)
    lengths = Lengths(prompt=config.prompt_tokens, continuation=config.continuation_tokens)
    rows = tuple(
        make_row(
            row,
            model,
            qualities[row],
            row_plan,
            lengths=lengths,
            kv_bytes=size,
            dense_kv_bytes=dense_bytes,
            metrics=metrics[row],
        )
        for row, row_plan, size in (("dense", None, dense_bytes), (name, plan, sent))
    )
    return Result(
        provenance=make_provenance(
            model, text=config.text, sequences=len(batch), lengths=lengths, plans=(plan,)
        ),
        rows=rows,
    )
