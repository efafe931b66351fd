"""KL, NLL and perplexity of held-out continuations under prefill/decode inference.

All variants are measured on the same target tokens, against one dense forward. The KL here is exact
over the whole vocabulary, in fp32 from the model's logits.

Shapes: B batch, C continuation tokens, V vocabulary, n sequences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pdtrim.calibration.teacher import head_rows
from pdtrim.errors import PlanError
from pdtrim.finite import finite
from pdtrim.models.model import Model
from pdtrim.progress import Progress, silent
from pdtrim.stage.forward import Batch, Trimmed, last_streams

ROWS = 4  # sequences run together


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Per-sequence means over continuation tokens, nats a token.

    Attributes:
        same_n: the share of tokens whose likeliest one is the dense model's; None where it was not
            kept.
    """

    kl_n: Tensor
    nll_n: Tensor
    same_n: Tensor | None = None

    @property
    def kl(self) -> float:
        """Mean KL(dense || variant)."""
        return float(self.kl_n.mean())

    @property
    def kl_error(self) -> float:
        """Standard error of :attr:`kl` over sequences; 0 for a single one."""
        n = len(self.kl_n)
        return float(self.kl_n.std()) / math.sqrt(n) if n > 1 else 0.0

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of the true continuation."""
        return float(self.nll_n.mean())

    @property
    def ppl(self) -> float:
        """Perplexity, ``exp(nll)``."""
        return math.exp(self.nll)


@torch.inference_mode()
def measure_quality(
    dense: Model,
    variants: Mapping[str, Trimmed],
    batch: Batch,
    *,
    progress: Progress = silent,
) -> dict[str, Quality]:
    """Measure variants on the same sequences.

    Raises:
        PlanError: a variant's model has another vocabulary than the dense one.
        PdtrimError: a KL or NLL is NaN or infinite.
    """
    for name, variant in variants.items():
        if variant.pair.decode.config.vocab_size != dense.config.vocab_size:
            raise PlanError(f"'{name}' and the dense model have different vocabularies")
    everything = [Trimmed.dense(dense), *variants.values()]
    rows: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in variants}
    with progress("measuring quality", len(batch) * len(everything)) as advance:
        for part in batch.to(dense.device).parts(ROWS):
            dense_BCE, *streams = last_streams(everything, part)
            for (name, variant), y_BCE in zip(variants.items(), streams, strict=True):
                rows[name].append(compare(dense, dense_BCE, variant, y_BCE, part))
            advance(len(part) * len(everything))
    return {
        name: Quality(
            kl_n=finite(torch.cat([k for k, _, _ in parts]), f"the KL of '{name}'"),
            nll_n=finite(torch.cat([n for _, n, _ in parts]), f"the NLL of '{name}'"),
            same_n=torch.cat([s for _, _, s in parts]),
        )
        for name, parts in rows.items()
    }


def compare(
    dense: Model, dense_BCE: Tensor, variant: Trimmed, y_BCE: Tensor, batch: Batch
) -> tuple[Tensor, Tensor, Tensor]:
    """KL, NLL and agreement of each sequence, ``[B]``, from what the two heads read."""
    B, C = batch.continuation_BC.shape
    columns = (dense_BCE.flatten(0, 1), y_BCE.flatten(0, 1), batch.continuation_BC.flatten())
    kl, nll, same = [], [], []
    rows = head_rows(dense.device)
    for dense_RE, y_RE, target_R in zip(*(c.split(rows) for c in columns), strict=True):
        logp_RV = F.log_softmax(dense.head(dense_RE), -1, dtype=torch.float32)
        logq_RV = F.log_softmax(variant.pair.decode.head(y_RE), -1, dtype=torch.float32)
        kl.append((logp_RV.exp() * (logp_RV - logq_RV)).sum(-1))
        nll.append(-logq_RV.gather(-1, target_R[:, None])[:, 0])
        same.append((logp_RV.argmax(-1) == logq_RV.argmax(-1)).float())
    return tuple(torch.cat(x).view(B, C).mean(1).cpu() for x in (kl, nll, same))  # type: ignore[return-value]
