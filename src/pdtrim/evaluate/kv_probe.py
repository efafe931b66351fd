"""A few needles before a codec is trusted with a model.

Some models break under a codec that others bear: Qwen2.5-7B is reported to find 0 to 4 % of needles
with symmetric 4-bit keys a token, because a few of its key channels are huge. The probe asks a
handful of needles with the plan's codecs, every pair kept, and without them. Selectors are left
out: what they lose is a choice, a codec that breaks the model is a mistake.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdtrim.calibration.tokens import encode_for
from pdtrim.errors import PlanError
from pdtrim.evaluate.kv_suite import retrieval_scores
from pdtrim.evaluate.retrieval import generate
from pdtrim.kv.codecs import Lossless, Raw
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.models.model import Model
from pdtrim.plan import Gates, LayerKV, PrunePlan
from pdtrim.progress import Progress, silent
from pdtrim.stage.forward import Pair


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Needles, prompt length, and the share of the findable ones that must still be found."""

    needles: int = 6
    tokens: int = 256
    share: float = 0.5
    seed: int = 0


def check_codecs(
    model: Model,
    plan: PrunePlan,
    config: ProbeConfig = ProbeConfig(),
    *,
    progress: Progress = silent,
) -> tuple[int, int] | None:
    """Needles found (with the plan's codecs, without); None where the plan loses no bits.

    Raises:
        PlanError: the codecs break the model; the message has the counts and what to try.
    """
    if all(isinstance(rule.codec, Raw | Lossless) for rule in plan.kv):
        return None
    probes = generate(
        "needle",
        count=config.needles,
        seed=config.seed,
        count_tokens=lambda text: len(encode_for(model, text)),
        tokens=config.tokens,
    )
    coded = HandoverPolicy(rules=tuple(LayerKV(codec=rule.codec) for rule in plan.kv))
    policies = {"coded": coded, "plain": HandoverPolicy.full(model.num_layers)}
    found = retrieval_scores(
        Pair.dense(model),
        Gates.dense(model.num_layers),
        policies,
        list(probes),
        hidden=True,
        progress=progress,
    )
    with_codec, without = int(found["coded"].sum()), int(found["plain"].sum())
    if with_codec < config.share * without:
        raise PlanError(
            f"the KV codecs of this plan break '{model.name}': with them it finds {with_codec} of"
            f" {config.needles} needles, without them {without}; use more bits or rotate=true"
        )
    return with_codec, without
