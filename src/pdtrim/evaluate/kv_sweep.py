"""Quality against bytes for many KV policies on one model: what ``pdtrim kv-sweep`` does.

No block is removed. All policies see the same prompts and the same target tokens; parameters that
must be fitted come from calibration text of another source. Bytes cross a real socket.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from pdtrim.bundle import TrimPlan
from pdtrim.calibration.batches import load_calibration, text_batch
from pdtrim.calibration.kept import kept_calibration, source_digest
from pdtrim.evaluate.configs import SweepConfig
from pdtrim.evaluate.handover import Loopback, loopback_bytes
from pdtrim.evaluate.kv_checks import sanity
from pdtrim.evaluate.kv_suite import KvSuiteConfig, run_suite
from pdtrim.evaluate.quality import Quality, measure_quality
from pdtrim.evaluate.result import Result, make_provenance, make_row
from pdtrim.keep.settings import Settings, package_versions
from pdtrim.keep.store import claim, once
from pdtrim.keep.tensors import ids_digest
from pdtrim.kv.codecs import CODECS
from pdtrim.kv.selectors import SELECTORS, SnapKV
from pdtrim.kvfit.budget import KVBudget
from pdtrim.kvfit.observed import Observed
from pdtrim.kvfit.policy import parse_policy
from pdtrim.kvfit.request import KVRequest
from pdtrim.models.model import Model
from pdtrim.plan import LayerKV, PrunePlan
from pdtrim.progress import Progress, silent
from pdtrim.records import Frozen
from pdtrim.stage.forward import Batch, Pair, Trimmed

T = TypeVar("T")

WIRE_PROMPTS = 2
SANITY = ("first_last@2.5x", "random@2.5x")
COMPRESSIONS = (2.5, 4.95, 10.0)  # of the selectors that drop tokens; 4.95 is the document's


def default_policies(head_dim: int, tokens: int, num_layers: int) -> dict[str, str]:
    """Family to policies, as ``family@name``; token counts are for prompts of ``tokens``.

    ``first_last`` at a compression is StreamingLLM's rule: it holds in every layer.
    """
    policies: dict[str, str] = {}
    for codec in CODECS.values():
        policies |= {name: f"full+{text}" for name, text in codec.sweep(head_dim).items()}
    for x in COMPRESSIONS:
        for name, selector in SELECTORS.items():
            if policy := selector.sweep(round(1 / x, 4), tokens):
                policies[f"{name}@{x}x"] = policy
    most = round(0.87 * num_layers)  # about the document's bytes at 512 tokens
    document = f"first_last:first=4,last=60,layers={most}"
    policies["first_last where attention concentrates@document"] = document
    policies["lazy_layer@tau 0.7"] = "lazy_layer:first=4,last=60,tau=0.7"
    for share in (0.8, 0.6, 0.4):
        policies[f"snapkv+entropy@{share}"] = f"{SnapKV.sweep(share, tokens)}+entropy"
    return policies


class _PerSequence(Frozen):
    """A policy's quality, a number a sequence."""

    kl: tuple[float, ...]
    nll: tuple[float, ...]


def sweep(
    model: Model,
    config: SweepConfig,
    folder: Path | None = None,
    *,
    progress: Progress = silent,
) -> Result:
    """Rows ``dense`` and one a policy; retrieval and decode's cache bytes in ``metrics``.

    Args:
        folder: where each fitted policy and each of the three measurements is kept once it is
            there, so that an interrupted sweep goes on.

    Raises:
        PdtrimError: unreadable text, or a folder of other settings or with a damaged cell.
    """
    batch = text_batch(
        model,
        config.text,
        prompt_tokens=config.prompt_tokens,
        continuation_tokens=config.continuation_tokens,
        limit=config.limit,
    )
    keep = _Cells.at(folder, model, config, batch)
    plans = {"dense": TrimPlan.dense(model).plan, **_plans(model, config, keep, progress)}
    pair = Pair.dense(model)
    variants = {name: Trimmed.of(plan, pair) for name, plan in plans.items()}
    digests = [f"{name} {plan.digest}" for name, plan in plans.items()]
    qualities = _qualities(model, variants, batch, digests, keep, progress)
    found = _retrieval(variants, config, digests, keep, progress) if config.probes else {}
    metrics = {**found, "dense": found.get("full", {})}
    sizes = keep.once(
        "bytes",
        dict[str, Loopback],
        lambda: _bytes(model, plans, batch, progress),
        plans=digests,
    )
    rows = tuple(
        make_row(
            name,
            model,
            qualities[name],
            plan,
            lengths=config.lengths,
            kv_bytes=sizes[name].frame,
            dense_kv_bytes=sizes["dense"].frame,
            settings=plan.provenance.method,
            metrics={**metrics.get(name, {}), "decode_cache_bytes": sizes[name].cache},
        )
        for name, plan in plans.items()
    )
    provenance = make_provenance(
        model,
        text=Path(config.text).name,
        sequences=len(batch),
        lengths=config.lengths,
        plans=tuple(plans.values())[1:],
    )
    problems = _problems(found, qualities) if found else ()
    return Result(provenance=provenance, rows=rows, problems=problems)


def markdown(result: Result) -> str:
    """The sweep as a Markdown table, best KL first."""
    lines = [
        "| policy | KV bytes | compression | KL | retrieval, question visible | hidden"
        " | decode cache |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(result.rows, key=lambda r: r.kl):
        found = [
            f"{100 * row.metrics[key]:.0f} %" if key in row.metrics else ""
            for key in ("retrieval_visible", "retrieval_hidden")
        ]
        lines.append(
            f"| {row.name} | {row.kv_bytes:,.0f} | {row.kv_compression:.2f}x"
            f" | {row.kl:.4f} ± {row.kl_error:.4f} | {found[0]} | {found[1]}"
            f" | {row.metrics['decode_cache_bytes'] / 2**20:.2f} MiB |"
        )
    lines += [f"\nNot to be trusted: {problem}." for problem in result.problems]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, kw_only=True)
class _Cells:
    """What a sweep keeps; nothing without a folder."""

    folder: Path | None
    settings: Settings

    @classmethod
    def at(cls, folder: Path | None, model: Model, config: SweepConfig, batch: Batch) -> _Cells:
        """The cells of a folder, which other settings may not share."""
        if folder is None:
            return cls(folder=None, settings={})
        settings = _settings(model, config, batch)
        claim(folder / "settings.json", settings)
        return cls(folder=folder, settings=settings)

    def once(self, name: str, kind: Any, make: Callable[[], T], **more: Any) -> T:
        """What the folder holds under a name, or else what ``make`` returns, then written there.

        Args:
            more: settings of this value alone.
        """
        if self.folder is None:
            return make()
        path = self.folder / "cells" / f"{name}.json"
        return once(path, kind, {**self.settings, **more}, make)


def _settings(model: Model, config: SweepConfig, batch: Batch) -> Settings:
    """All that a sweep's numbers depend on."""
    return {
        **{key: value for key, value in asdict(config).items() if key != "text"},
        "model": model.fingerprint,
        "dtype": model.dtype_name,
        "device": model.device.type,
        "calibration_sha256": source_digest(config.calibration),
        "text": ids_digest(batch.prompt_BP, batch.continuation_BC),
        "versions": package_versions(),
    }


def _qualities(
    model: Model,
    variants: dict[str, Trimmed],
    batch: Batch,
    plans: list[str],
    keep: _Cells,
    progress: Progress,
) -> dict[str, Quality]:
    def measure() -> dict[str, _PerSequence]:
        found = measure_quality(model, variants, batch, progress=progress)
        return {
            name: _PerSequence(kl=tuple(q.kl_n.tolist()), nll=tuple(q.nll_n.tolist()))
            for name, q in found.items()
        }

    kept = keep.once("quality", dict[str, _PerSequence], measure, plans=plans)
    return {
        name: Quality(kl_n=torch.tensor(q.kl), nll_n=torch.tensor(q.nll))
        for name, q in kept.items()
    }


def _retrieval(
    variants: dict[str, Trimmed],
    config: SweepConfig,
    plans: list[str],
    keep: _Cells,
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """What decode retrieves under each policy; the dense model's is ``full``."""
    suite = KvSuiteConfig(probes=config.probes, tokens=config.prompt_tokens, seed=config.seed)
    policies = {name: variant.policy for name, variant in variants.items()}
    policies["full"] = policies.pop("dense")

    def measure() -> dict[str, dict[str, float]]:
        return dict(run_suite(variants["dense"], policies, suite, progress=progress))

    return keep.once("retrieval", dict[str, dict[str, float]], measure, plans=plans)


def _problems(found: dict[str, dict[str, float]], qualities: dict[str, Quality]) -> tuple[str, ...]:
    """Why retrieval is not to be trusted, if it contradicts what is known of two policies."""
    kls = {name: quality.kl for name, quality in qualities.items()}
    kls["full"] = kls["dense"]
    return tuple(sanity(found, kls, first_last=SANITY[0], random=SANITY[1]))


def _plans(
    model: Model, config: SweepConfig, keep: _Cells, progress: Progress
) -> dict[str, PrunePlan]:
    short = replace(config, continuation_tokens=min(128, config.continuation_tokens))
    asked = short.calibration_config(config.calibration, config.seed, search=4)
    if keep.folder is None:
        text = load_calibration(model, asked, progress=progress)
    else:
        text = kept_calibration(model, asked, keep.folder / "text.safetensors", progress=progress)
    wanted = default_policies(model.head_dim, config.prompt_tokens - 1, model.num_layers)
    for compression in config.budgets:
        wanted[f"budget@{compression:g}x"] = KVBudget(compression=compression).text
        packed = KVBudget(compression=compression, codecs="packed")
        wanted[f"budget, packed codecs@{compression:g}x"] = packed.text
    dense = TrimPlan.dense(model).plan
    observed = Observed.of(model, text.search)

    def fit(text: str) -> tuple[LayerKV, ...]:
        policy = parse_policy(text)
        if isinstance(policy, KVRequest):
            return policy.fit(observed)
        return policy.resolve(model, observed.batch)

    plans = {}
    with progress("fitting policies", len(wanted)) as advance:
        for number, (name, policy) in enumerate(wanted.items()):
            rules = keep.once(
                f"policy{number:03d}", tuple[LayerKV, ...], partial(fit, policy), policy=policy
            )
            provenance = dense.provenance.model_copy(
                update={
                    "method": policy,
                    "calibration": text.source,
                    "calibration_hash": text.hash,
                    "seed": config.seed,
                }
            )
            plans[name] = dense.model_copy(update={"kv": rules, "provenance": provenance})
            advance(1)
    return plans


@torch.inference_mode()
def _bytes(
    model: Model, plans: dict[str, PrunePlan], batch: Batch, progress: Progress
) -> dict[str, Loopback]:
    sizes = {}
    with progress("counting bytes on the wire", len(plans)) as advance:
        for name, plan in plans.items():
            sizes[name] = loopback_bytes(plan, model, batch[:WIRE_PROMPTS])
            advance(1)
    return sizes
