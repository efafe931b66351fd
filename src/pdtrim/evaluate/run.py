"""Evaluate a plan file or an exported pair on held-out text: what ``pdtrim eval`` does."""

from __future__ import annotations

from pathlib import Path

from pdtrim.bundle import TrimPlan
from pdtrim.calibration.batches import text_batch
from pdtrim.evaluate.configs import EvalConfig
from pdtrim.evaluate.handover import Ran, run_plan
from pdtrim.evaluate.kv_suite import KvSuiteConfig, run_suite
from pdtrim.evaluate.quality import measure_quality
from pdtrim.evaluate.result import Result, make_provenance, make_row
from pdtrim.exported import base_model
from pdtrim.models.model import Model
from pdtrim.progress import Progress, silent
from pdtrim.stage.forward import Batch, Trimmed

WIRE_PROMPTS = 4  # prompts whose handover is counted; their lengths are equal


def evaluate_text(
    pair: str | Path,
    config: EvalConfig,
    *,
    model: str | None = None,
    dtype: str = "bfloat16",
    device: str = "cpu",
    progress: Progress = silent,
) -> Result:
    """Rows ``dense`` and the plan's method, on the same tokens of ``config.text``.

    Args:
        pair: a plan file, or a folder that ``export`` wrote.
        model: where the dense model is, if not where the plan says.

    Raises:
        PdtrimError: unreadable plan, pair, model or text.
    """
    assert config.text is not None
    trim = TrimPlan.open(pair)
    plan, name = trim.plan, trim.name
    dense = base_model(plan, source=model, dtype=dtype, device=device)
    batch = text_batch(
        dense,
        config.text,
        prompt_tokens=config.prompt_tokens,
        continuation_tokens=config.continuation_tokens,
        limit=config.sequences,
    )
    variants = {"dense": Trimmed.dense(dense), name: Trimmed.of(plan, trim.pair(dense))}
    qualities = measure_quality(dense, variants, batch, progress=progress)
    metrics = _retrieval(variants, config, progress)
    whole, sent = _run_both(trim, dense, batch[:WIRE_PROMPTS], config.ask, progress)
    rows = tuple(
        make_row(
            row,
            dense,
            qualities[row],
            row_plan,
            lengths=config.lengths,
            kv_bytes=ran.kv_bytes,
            dense_kv_bytes=whole.kv_bytes,
            answer=ran.answer,
            metrics=metrics[row],
        )
        for row, row_plan, ran in (("dense", None, whole), (name, plan, sent))
    )
    return Result(
        provenance=make_provenance(
            dense, text=config.text, sequences=len(batch), lengths=config.lengths, plans=(plan,)
        ),
        rows=rows,
    )


def _retrieval(
    variants: dict[str, Trimmed], config: EvalConfig, progress: Progress
) -> dict[str, dict[str, float]]:
    """What decode retrieves from the prompt, by row; nothing if it is not asked for."""
    if not config.suite:
        return {name: {} for name in variants}
    suite = KvSuiteConfig(probes=config.probes, tokens=config.prompt_tokens)
    dense, (name, trimmed) = variants["dense"], list(variants.items())[-1]
    return {
        "dense": run_suite(dense, {}, suite, progress)["full"],
        name: run_suite(trimmed, {name: trimmed.policy}, suite, progress)[name],
    }


def _run_both(
    trim: TrimPlan, dense: Model, prompts: Batch, ask: str | None, progress: Progress
) -> tuple[Ran, Ran]:
    """What two processes do, dense and under the plan."""
    with progress("counting bytes on the wire", 2) as advance:
        whole = run_plan(TrimPlan.dense(dense), dense, prompts, ask)
        advance(1)
        sent = run_plan(trim, dense, prompts, ask)
        advance(1)
    return whole, sent
