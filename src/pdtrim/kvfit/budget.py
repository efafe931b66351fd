"""A byte budget for the handover, split over layers by measured KL.

The menu holds selectors and codecs; a layer takes one entry of it. All entries are first measured
in every layer at once. From those nearest to the budget (the anchors) each layer's deviations to
the other entries are measured alone, everything else held at the anchor: so interactions between
layers are in the numbers, which matters because dropped tokens add up faster than linearly. For
each anchor the deviations with the best trade are taken until the budget is met (a Lagrangian
sweep), the result is measured as a whole, and the best result wins. It is never worse, on the
calibration text, than the best single entry that meets the budget.

The text is calibration text and, below it, the same prompts continued by pieces of themselves
(``calibration/recall.py``): KL on web text alone hardly needs what a question could ask for.

KVServe (2605.13734) and LU-KV (2602.08585) allocate bits or tokens to heads offline; here both come
from one menu, and the document's first/last rule, DuoAttention's heads and mixed precision are
entries or mixtures of it.

Shapes: L layers, O menu entries.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from pdtrim.calibration.recall import with_recall
from pdtrim.calibration.teacher import Teacher
from pdtrim.errors import PlanError
from pdtrim.finite import finite
from pdtrim.kv.groups import HeadGroup
from pdtrim.kv.policy import HandoverPolicy, hand_over
from pdtrim.kvfit.menu import Codecs, default_menu
from pdtrim.kvfit.observed import Observed
from pdtrim.kvfit.request import KVRequest
from pdtrim.kvfit.sizes import full_bytes, rule_bytes
from pdtrim.models.model import Model
from pdtrim.plan import LayerKV
from pdtrim.progress import Progress, silent
from pdtrim.records import Frozen, shortened
from pdtrim.stage.forward import Batch, decode_stream

Rules = tuple[LayerKV, ...]

ANCHORS = 1
DOUBLINGS = 400  # of a price, at most
REACH = 2.0  # entries whose bytes differ from the budget by more than this factor are not tried

NUMBER = r"[0-9]+(?:\.[0-9]*)?(?:e[+-]?[0-9]{1,4})?|\.[0-9]+"
BUDGET = re.compile(rf"budget:compression=({NUMBER})(?:,codecs=(any|packed))?", re.ASCII)
"""Reads all that :attr:`KVBudget.text` writes, and plain numbers."""


class KVBudget(Frozen):
    """``budget:compression=X[,codecs=packed]``."""

    compression: float = Field(ge=1, allow_inf_nan=False)
    codecs: Codecs = "any"

    @property
    def text(self) -> str:
        """As a user writes it."""
        codecs = "" if self.codecs == "any" else f",codecs={self.codecs}"
        number = repr(self.compression).removesuffix(".0")  # as many digits as tell it apart
        return f"budget:compression={number}{codecs}"

    @classmethod
    def parse(cls, text: str) -> KVBudget:
        """Read what :attr:`text` writes.

        Raises:
            PlanError: the text is no budget.
        """
        found = BUDGET.fullmatch(text)
        if found is None:
            raise PlanError(
                f"KV policy '{shortened(text)}': write budget:compression=5 or"
                " budget:compression=5,codecs=packed"
            )
        compression = float(found[1])
        if not 1 <= compression < math.inf:
            raise PlanError(f"KV compression {shortened(found[1])} must be a number of at least 1")
        return cls(compression=compression, codecs="packed" if found[2] == "packed" else "any")

    def resolve(
        self, model: Model, batch: Batch, *, block_size: int = 1, progress: Progress = silent
    ) -> Rules:
        """One rule a layer, measured on calibration text.

        Raises:
            PlanError: the menu does not reach the budget.
        """
        menu = default_menu(model.head_dim, self.codecs)
        return allocate(model, batch, self.compression, menu=menu, progress=progress).rules


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What a budget bought.

    Attributes:
        compression: full bf16 bytes over bytes of the calibration prompts' pairs and masks.
        kl: on calibration text and recall; ``uniform_kl`` that of the best single entry in all
            layers.
        entries: the menu entry of each layer.
    """

    rules: Rules
    compression: float
    kl: float
    uniform_kl: float
    entries: tuple[str, ...]


class KVObjective:
    """KL of KV policies on the dense model, on one text.

    The prompt's streams do not depend on the policy: they are run once, what a layer's rule hands
    over is computed once for each rule, and a candidate costs decode's layers from the first in
    which it differs from the policy that the search stands on.
    """

    def __init__(self, model: Model, batch: Batch) -> None:
        self.model = model
        self.observed = Observed.of(model, batch)
        self.batch = self.observed.batch
        self.views = [self.observed.view(layer) for layer in range(model.num_layers)]
        with torch.inference_mode():
            self.teacher = Teacher.of(model, self.batch)
        self.base: list[list[HeadGroup]] = []
        self.entries: list[Tensor] = []  # streams that enter each layer under the base

    @torch.inference_mode()
    def hand(self, rule: LayerKV, layer: int) -> list[HeadGroup]:
        """What a rule hands over of a layer."""
        policy = HandoverPolicy(rules=(rule,) * self.model.num_layers)
        return hand_over(policy, layer, self.views[layer])

    def bytes_of(self, rules: Rules) -> Tensor:
        """Bytes that each layer's rule sends, ``[L]``."""
        sizes = [rule_bytes(*pair) for pair in zip(self.views, rules, strict=True)]
        return torch.tensor(sizes, dtype=torch.float64)

    @torch.inference_mode()
    def stand_on(self, rules: Rules) -> float:
        """Make a policy the one that others are compared with; returns its KL."""
        self.base = [self.hand(rule, layer) for layer, rule in enumerate(rules)]
        y = self.observed.trace[0][1]
        self.entries = [y]
        for layer in range(self.model.num_layers):
            y = decode_stream(self.model, self.batch, self.base, y, start=layer, stop=layer + 1)
            self.entries.append(y)
        return self._kl(y)

    @torch.inference_mode()
    def kl_with(self, layer: int, groups: list[HeadGroup]) -> float:
        """KL of the base with one layer's handover replaced."""
        handed = [*self.base[:layer], groups, *self.base[layer + 1 :]]
        y = decode_stream(self.model, self.batch, handed, self.entries[layer], start=layer)
        return self._kl(y)

    def _kl(self, y_BCE: Tensor) -> float:
        return float(finite(self.teacher.kl(self.model, y_BCE).mean(), "the KL of a KV policy"))


def allocate(
    model: Model,
    batch: Batch,
    compression: float,
    *,
    menu: Sequence[str] | None = None,
    progress: Progress = silent,
) -> Allocation:
    """The policy with the least KL whose bytes are at most the full bytes over ``compression``.

    Args:
        batch: calibration text; its prompts should be as long as those to be served.
        menu: KV policies by the grammar of ``kvfit/request.py``.

    Raises:
        PlanError: no entry of the menu is as small as that.
    """
    if not 1 <= compression < math.inf:
        raise PlanError(f"KV compression {compression} must be a number of at least 1")
    names = tuple(menu or default_menu(model.head_dim))
    objective = KVObjective(model, with_recall(batch))
    full = full_bytes(model, objective.observed.tokens)
    budget = full / compression
    table = {name: KVRequest.parse(name).fit(objective.observed) for name in names}
    sizes = {name: objective.bytes_of(rules) for name, rules in table.items()}
    near = [n for n in names if budget / REACH <= float(sizes[n].sum()) <= budget * REACH]
    meeting = [n for n in near if float(sizes[n].sum()) <= budget]
    if not meeting:
        least = full / min(float(s.sum()) for s in sizes.values())
        raise PlanError(
            f"KV compression {compression} is out of reach: the menu ends at {least:.1f}"
        )
    evaluations = len(near) + ANCHORS * model.num_layers * (len(near) - 1) + ANCHORS
    with progress("splitting the KV budget", evaluations) as advance:
        uniform = {}
        for name in near:
            uniform[name] = objective.stand_on(table[name])
            advance(1)
        best_uniform = min(meeting, key=lambda n: uniform[n])
        found = [(uniform[best_uniform], table[best_uniform], (best_uniform,) * model.num_layers)]
        for anchor in _anchors(near, uniform, sizes, budget):
            entries = _mix(objective, table, sizes, near, anchor, budget, advance)
            if entries is not None:
                rules = tuple(table[name][layer] for layer, name in enumerate(entries))
                found.append((objective.stand_on(rules), rules, entries))
            advance(1)
    kl, rules, entries = min(found, key=lambda item: item[0])
    sent = sum(float(sizes[name][layer]) for layer, name in enumerate(entries))
    return Allocation(
        rules=rules,
        compression=full / sent,
        kl=kl,
        uniform_kl=uniform[best_uniform],
        entries=entries,
    )


def _anchors(
    near: list[str], uniform: dict[str, float], sizes: dict[str, Tensor], budget: float
) -> list[str]:
    """The entries of the lower envelope of KL over bytes that stand nearest to the budget."""

    def beaten(name: str) -> bool:
        return any(
            uniform[other] < uniform[name] and sizes[other].sum() <= sizes[name].sum()
            for other in near
        )

    front = [name for name in near if not beaten(name)]
    return sorted(front, key=lambda n: abs(float(sizes[n].sum()) / budget - 1))[:ANCHORS]


def _mix(
    objective: KVObjective,
    table: dict[str, Rules],
    sizes: dict[str, Tensor],
    near: list[str],
    anchor: str,
    budget: float,
    advance: Callable[[float], None],
) -> tuple[str, ...] | None:
    """Entries a layer that meet the budget with the least sum of measured deviations."""
    base_kl = objective.stand_on(table[anchor])
    layers = len(table[anchor])
    cost_LO = torch.zeros(layers, len(near), dtype=torch.float64)
    for layer in range(layers):
        for o, name in enumerate(near):
            if name != anchor:
                groups = objective.hand(table[name][layer], layer)
                cost_LO[layer, o] = objective.kl_with(layer, groups) - base_kl
                advance(1)
    bytes_LO = torch.stack([sizes[name] for name in near], dim=1)
    choice = lagrangian(cost_LO, bytes_LO, budget)
    return None if choice is None else tuple(near[o] for o in choice)


def lagrangian(cost_LO: Tensor, bytes_LO: Tensor, budget: float) -> list[int] | None:
    """The entry of each layer that minimises the summed cost at no more than the budget's bytes.

    Exact on the convex hull of the trade; what is then left of the budget is spent greedily. None
    if even the smallest entries pass the budget.
    """
    if float(bytes_LO.min(1).values.sum()) > budget:
        return None
    low, high = 0.0, 1.0

    def pick(price: float) -> Tensor:
        # among equal trades the smaller entry, so that a high price always ends in the budget
        return (cost_LO + price * bytes_LO + 1e-18 * bytes_LO).argmin(1)

    def spent(choice_L: Tensor) -> float:
        return float(bytes_LO.gather(1, choice_L[:, None]).sum())

    finite(cost_LO, "the KL of a KV policy")
    for _ in range(DOUBLINGS):  # in the end bytes alone decide
        if spent(pick(high)) <= budget:
            break
        high *= 4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if spent(pick(middle)) <= budget else (middle, high)
    choice_L = pick(high)
    while True:  # spend what is left: the cost falls at each step, among finitely many choices
        left = budget - spent(choice_L)
        now_cost = cost_LO.gather(1, choice_L[:, None])
        now_bytes = bytes_LO.gather(1, choice_L[:, None])
        gain = torch.where(bytes_LO - now_bytes <= left, now_cost - cost_LO, -torch.inf)
        at = int(gain.argmax())
        if float(gain.flatten()[at]) <= 1e-12:
            return choice_L.tolist()
        choice_L[at // cost_LO.shape[1]] = at % cost_LO.shape[1]
