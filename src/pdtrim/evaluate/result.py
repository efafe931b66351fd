"""Result files, schema ``pdtrim.result/1``: numbers and what is needed to repeat them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from pdtrim.evaluate.quality import Quality
from pdtrim.keep.document import Document
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.models.model import Model
from pdtrim.plan import Gates, PrunePlan
from pdtrim.records import Frozen
from pdtrim.stage.cost import Lengths, stage_flops
from pdtrim.versions import host, versions


class Row(Frozen):
    """One variant, measured.

    Attributes:
        kl: mean KL(dense || this), nats a continuation token; ``kl_error`` its standard error over
            sequences.
        nll, ppl: of the true continuation.
        kv_bytes: mean bytes a prompt that crossed the socket, headers included.
        kv_compression: the dense row's ``kv_bytes`` over this row's.
        prefill_flops_ratio, decode_flops_ratio: this stage's operations over the dense model's.
        prefill_blocks, decode_blocks: blocks whose attention and MLP the stage still runs.
        search_block_tokens: tokens x blocks that the search ran.
        wall_s: seconds of planning (0 for a dense row).
        plan_digest: of the plan; None for the dense row.
        metrics: further numbers by name, such as retrieval of the KV suite.
    """

    name: str
    settings: str = ""
    kl: float = Field(ge=-1e-3)  # a KL of 0 may round below it
    kl_error: float = Field(ge=0)
    nll: float
    ppl: float
    kv_bytes: float = Field(ge=0)
    kv_compression: float = Field(gt=0)
    prefill_flops_ratio: float = Field(ge=0)
    decode_flops_ratio: float = Field(ge=0)
    prefill_blocks: int = Field(ge=0)
    decode_blocks: int = Field(ge=0)
    search_block_tokens: int = Field(ge=0)
    wall_s: float = Field(ge=0)
    plan_digest: str | None = None
    answer: str | None = None
    metrics: dict[str, float] = Field(default_factory=dict)


class ResultProvenance(Frozen):
    """What the numbers were measured with."""

    model: str
    model_fingerprint: str
    dtype: str
    text: str
    sequences: int
    prompt_tokens: int
    continuation_tokens: int
    calibration: str | None = None
    calibration_hash: str | None = None
    seed: int | None = None
    plan_digests: tuple[str, ...] = ()
    versions: dict[str, str]
    host: dict[str, str | int]


class Result(Document):
    """A result file; ``problems`` are reasons not to trust it, found by its own sanity checks."""

    schema_id: Literal["pdtrim.result/1"] = Field(default="pdtrim.result/1", alias="schema")
    provenance: ResultProvenance
    rows: tuple[Row, ...] = Field(min_length=1)
    problems: tuple[str, ...] = ()


def make_row(
    name: str,
    model: Model,
    quality: Quality,
    plan: PrunePlan | None,
    *,
    lengths: Lengths,
    kv_bytes: float,
    dense_kv_bytes: float,
    settings: str = "",
    answer: str | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Row:
    """Put one variant's measurements together; ``plan`` None is the dense model.

    Args:
        lengths: of each sequence, for the operation counts.
    """
    dense_gates = Gates.dense(model.num_layers)
    full = HandoverPolicy.full(model.num_layers)
    gates = plan.gates if plan else dense_gates
    policy = HandoverPolicy.of(plan) if plan else full
    widths = plan.widths if plan else None
    prefill, decode = stage_flops(model.config, gates, policy, lengths, widths=widths)
    dense_prefill, dense_decode = stage_flops(model.config, dense_gates, full, lengths)
    return Row(
        name=name,
        settings=settings,
        kl=quality.kl,
        kl_error=quality.kl_error,
        nll=quality.nll,
        ppl=quality.ppl,
        kv_bytes=kv_bytes,
        kv_compression=dense_kv_bytes / kv_bytes,
        prefill_flops_ratio=prefill / dense_prefill if dense_prefill else 1.0,
        decode_flops_ratio=decode / dense_decode,
        prefill_blocks=gates.blocks("prefill"),
        decode_blocks=gates.blocks("decode"),
        search_block_tokens=plan.provenance.search_block_tokens if plan else 0,
        wall_s=plan.provenance.wall_s if plan else 0.0,
        plan_digest=plan.digest if plan else None,
        answer=answer,
        metrics=dict(metrics or {}),
    )


def make_provenance(
    model: Model,
    *,
    text: str,
    sequences: int,
    lengths: Lengths,
    plans: tuple[PrunePlan, ...],
) -> ResultProvenance:
    """Where a result's numbers come from; the first plan tells the calibration."""
    first = plans[0].provenance if plans else None
    return ResultProvenance(
        model=model.name,
        model_fingerprint=model.fingerprint,
        dtype=model.dtype_name,
        text=text,
        sequences=sequences,
        prompt_tokens=lengths.prompt,
        continuation_tokens=lengths.continuation,
        calibration=first.calibration if first else None,
        calibration_hash=first.calibration_hash if first else None,
        seed=first.seed if first else None,
        plan_digests=tuple(plan.digest for plan in plans),
        versions=versions(),
        host=host(),
    )
