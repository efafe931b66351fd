"""Keep the pairs that a linear gate on the hidden state thinks will be attended to.

``s[n, g] = w_g . h[n] + b_g``, a forecast of the log of the largest share of attention that the
pair gets from later queries; kept where ``s >= threshold``, and in the first and last tokens. The
threshold is for all prompts, so that a prompt with little to say sends little.

Paper: KVzap (arXiv 2601.07891), its linear form. Different from the paper: the target is the
attention that real later queries pay (:func:`attention_received`), not that of a second pass which
repeats the prompt; it is not divided by norms; and the first tokens stay too.

Shapes: B rows, N prompt tokens, E hidden width, H query heads, G KV heads, R = H / G, C later
queries, D head width, S samples.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from pdtrim.errors import PlanError
from pdtrim.kv.selectors.base import Mask, Observed, SelectorBase
from pdtrim.kv.selectors.first_last import first_last
from pdtrim.kv.view import LayerView
from pdtrim.records import MOST_TOKENS

RIDGE = 1e-2


class LinearGate(SelectorBase):
    """Pairs whose forecast reaches a threshold."""

    fitted: ClassVar[Mapping[str, Any]] = {"weights": "AAAAAA==", "threshold": 0.0}
    asked: ClassVar[Sequence[str]] = ("share",)
    numbers_heads: ClassVar[bool] = True
    mask: ClassVar[Mask] = "pair"

    name: Literal["gate"] = "gate"
    weights: str = Field(min_length=1)
    """base64 of little-endian float16 ``[G, E + 1]``, the bias last: see :func:`pack_weights`."""
    threshold: float = Field(allow_inf_nan=False)
    first: int = Field(default=4, ge=0, le=MOST_TOKENS)
    last: int = Field(default=128, ge=1, le=MOST_TOKENS)

    @field_validator("weights")
    @classmethod
    def _readable(cls, weights: str) -> str:
        if not torch.isfinite(_unpack(weights)).all():
            raise ValueError("has numbers that are not finite")
        return weights

    @classmethod
    def fit(
        cls, observed: Observed, options: Mapping[str, str], share: float | None
    ) -> Sequence[LinearGate]:
        """A threshold that ``share`` (half, unless given) of a layer's pairs reach."""
        selectors = []
        for layer in range(observed.num_layers):
            view = observed.view(layer)
            target_BGN = attention_received(observed.later_queries(layer), view.k_BGND, view.scale)
            h_SE = view.h_BNE.flatten(0, 1).float()
            weight_GF = fit_gate(h_SE, target_BGN.transpose(1, 2).flatten(0, 1), RIDGE)
            scores = gate_score(view.h_BNE, weight_GF)
            threshold = threshold_for(scores, 0.5 if share is None else share)
            found = {"weights": pack_weights(weight_GF), "threshold": threshold}
            selectors.append(cls.build(options, **found))
        return selectors

    @classmethod
    def sweep(cls, share: float, tokens: int) -> str:
        """See the base class."""
        return f"gate:share={share},last=16"

    def keep(self, view: LayerView, *, block_size: int = 1) -> Tensor:
        """See the base class."""
        G, N, E = view.k_BGND.shape[1], view.h_BNE.shape[1], view.h_BNE.shape[2]
        flat = _unpack(self.weights)
        if flat.numel() != G * (E + 1):
            raise PlanError(f"'gate' holds {flat.numel()} weights, but the layer takes {G}x{E + 1}")
        score_BGN = gate_score(view.h_BNE, flat.view(G, E + 1).to(view.h_BNE.device))
        edge_N = first_last(N, first=self.first, last=self.last).to(score_BGN.device)
        return (score_BGN >= self.threshold) | edge_N


def gate_score(h_BNE: Tensor, weight_GF: Tensor) -> Tensor:
    """Forecasts ``[B, G, N]``; F = E + 1, the bias last."""
    weight_GF = weight_GF.float()
    return (h_BNE.float() @ weight_GF[:, :-1].mT + weight_GF[:, -1]).mT


def attention_received(q_BHCD: Tensor, k_BGND: Tensor, scale: float) -> Tensor:
    """Log of the largest share of attention that each pair gets from any of C later queries.

    ``[B, G, N]``, the largest also over the R query heads. Every query sees every key, and the
    shares are over these N keys.
    """
    q_BGRCD = q_BHCD.float().unflatten(1, (k_BGND.shape[1], -1)) * scale
    return (q_BGRCD @ k_BGND.float().mT.unsqueeze(2)).log_softmax(dim=-1).amax(dim=(2, 3))


def fit_gate(h_SE: Tensor, target_SG: Tensor, ridge: float) -> Tensor:
    """The weights ``[G, E + 1]`` that minimise ``|h w + b - target|^2 + ridge |w|^2``, in fp64."""
    h_SE, target_SG = h_SE.double(), target_SG.double()
    mean_E, mean_G = h_SE.mean(dim=0), target_SG.mean(dim=0)
    h_SE = h_SE - mean_E  # centred, so that the bias is free of the penalty
    gram_EE = h_SE.mT @ h_SE + ridge * torch.eye(len(mean_E)).to(h_SE)
    w_EG = torch.linalg.solve(gram_EE, h_SE.mT @ (target_SG - mean_G))
    return torch.cat((w_EG.mT, (mean_G - mean_E @ w_EG)[:, None]), dim=1)


def pack_weights(weight_GF: Tensor) -> str:
    """The text form that a plan holds."""
    half = weight_GF.detach().cpu().to(torch.float16)
    if not torch.isfinite(half).all():
        raise PlanError("gate weights do not fit in float16; fit them with a larger ridge")
    return base64.b64encode(half.numpy().astype("<f2").tobytes()).decode("ascii")


def threshold_for(scores: Tensor, keep: float) -> float:
    """The threshold that a share ``keep`` of ``scores`` reaches."""
    flat = scores.flatten()
    count = min(flat.numel(), max(1, math.ceil(keep * flat.numel() - 1e-9)))
    return float(flat.kthvalue(flat.numel() - count + 1).values)


def _unpack(weights: str) -> Tensor:
    try:
        data = base64.b64decode(weights, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("is not base64") from error
    if len(data) % 2:
        raise ValueError("is not a whole number of float16")
    return torch.from_numpy(np.frombuffer(data, dtype="<f2").astype(np.float32))
