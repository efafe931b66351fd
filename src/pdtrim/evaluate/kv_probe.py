"""A few needles and a KL before a codec is trusted with a model.

Some models break under a codec that others bear: Qwen2.5-7B is reported to find 0 to 4 % of needles
with symmetric 4-bit keys a token, because a few of its key channels are huge. The probe asks a
handful of needles with the plan's codecs, every pair kept, and without them; and it measures how
far the codecs move what the model says next, which needles of a model that finds few cannot tell.
Selectors are left out: what they lose is a choice, a codec that breaks the model is a mistake.

Shapes: B rows, P prompt tokens, C continuation tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pdtrim.calibration.tokens import encode_for
from pdtrim.errors import PlanError
from pdtrim.evaluate.kv_suite import retrieval_scores
from pdtrim.evaluate.quality import compare
from pdtrim.evaluate.retrieval import Probe, generate
from pdtrim.finite import finite
from pdtrim.kv.codecs import parse_codec
from pdtrim.kv.codecs.integer import rotated
from pdtrim.kv.policy import HandoverPolicy, hand_over
from pdtrim.kvfit.observed import Observed
from pdtrim.models.model import Model
from pdtrim.plan import LayerKV, PrunePlan
from pdtrim.progress import Progress, silent
from pdtrim.stage.forward import Batch, Trimmed, decode_stream

TRIED = ("int3", "int3:rotate=true", "int4", "int4:rotate=true", "fp8", "int8", "lossless")
"""What a refusal may advise, smaller first."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Needles, prompt length, and what must hold.

    Attributes:
        share: of the needles that are found plainly, those that must still be found.
        kl: the most that the codecs may cost on any of the prompts, nats a token.
        copied: tokens of the prompt that the KL's continuation begins anew; as many go on from it.
    """

    needles: int = 6
    tokens: int = 256
    share: float = 0.5
    seed: int = 0
    kl: float = 0.4
    copied: int = 32


@dataclass(frozen=True, kw_only=True)
class Probed:
    """Needles found with the plan's codecs and without, and the codecs' KL on the worst prompt."""

    found: int
    plainly: int
    kl: float


def check_codecs(
    model: Model,
    plan: PrunePlan,
    config: ProbeConfig = ProbeConfig(),
    *,
    progress: Progress = silent,
) -> Probed | None:
    """What was measured; None where the plan loses no bits.

    Raises:
        PlanError: the codecs break the model; the message has the numbers and a codec that does
            not.
    """
    if all(plan.kv[layer].codec.exact for layer in plan.sent_layers):
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
    hits = retrieval_scores(
        Trimmed.dense(model),
        policies,
        list(probes),
        hidden=True,
        progress=progress,
    )
    costs = Costs(model, copying(model, list(probes), config))
    found, plainly = int(hits["coded"].sum()), int(hits["plain"].sum())
    kl = costs.kl(coded)
    if found < config.share * plainly or not kl <= config.kl:  # so that NaN is refused
        raise PlanError(
            f"the KV codecs of this plan break '{model.name}': with them it finds {found} of"
            f" {config.needles} needles, without them {plainly}, and they cost {kl:.3g} nats a"
            f" token, which may be {config.kl:g}; {_advice(costs, config)}"
        )
    return Probed(found=found, plainly=plainly, kl=kl)


def copying(model: Model, probes: list[Probe], config: ProbeConfig) -> Batch:
    """The probes' texts, each continued by its next tokens and then by its first ones again."""
    C = config.copied
    rows = [encode_for(model, probe.context + probe.question) for probe in probes]
    P = min(map(len, rows)) - C
    ids = torch.tensor([row[: P + C] + row[:C] for row in rows])
    return Batch.cut(ids, P)


class Costs:
    """KL of KV policies to the whole cache; the prompts are prefilled once for all of them."""

    @torch.inference_mode()
    def __init__(self, model: Model, batch: Batch) -> None:
        self.dense = Trimmed.dense(model)
        self.observed = Observed.of(model, batch)
        self.views = [self.observed.view(layer) for layer in range(model.num_layers)]

    @torch.inference_mode()
    def kl(self, policy: HandoverPolicy) -> float:
        """Nats a token on the prompt that suffers most.

        Not the mean: a codec that breaks a model breaks it on some prompts, and goes unseen on
        others.

        Raises:
            PdtrimError: it is NaN or infinite.
        """
        model, batch, trace = self.observed.model, self.observed.batch, self.observed.trace
        handed = [hand_over(policy, layer, view) for layer, view in enumerate(self.views)]
        y_BCE = decode_stream(model, batch, handed, trace[0][1])
        kl_B, _, _ = compare(model, trace[-1][1], self.dense, y_BCE, batch)
        return float(finite(kl_B, "the KL of a codec").max())


def _advice(costs: Costs, config: ProbeConfig) -> str:
    """The smallest codec that costs little, or the last one."""
    model = costs.observed.model
    for name in TRIED:
        if "rotate" in name and not rotated(model.head_dim):
            continue
        kl = costs.kl(HandoverPolicy(rules=(_rule(name),) * model.num_layers))
        if kl <= config.kl / 2:
            break
    return f"'full+{name}' costs {kl:.3g}"


def _rule(codec: str) -> LayerKV:
    return LayerKV.model_validate({"codec": parse_codec(codec).model_dump()})
