"""A KV policy as a user asks for it, and how its layers are chosen from attention.

Grammar: ``full``, or ``first_last`` with options after a colon, in any order::

    first_last:first=4,last=60            layers where attention concentrates there
    first_last:first=4,last=60,layers=20  the 20 layers where it concentrates most
    first_last:first=4,last=60,layers=all every layer
    first_last:first=4,last=60,cutoff=0.9 stricter about what counts as concentrated

Concentration is measured for each attention head: the share of what continuation tokens pay to the
prompt that goes to its first and last tokens. A head is concentrated from ``cutoff`` on; a layer is
selected if at least half of its heads are (PDTrim, arXiv 2509.04467: "an attention-score cutoff";
the half is ours, as a layer is what the paper selects).

Shapes: B batch, C continuation tokens, N prompt tokens handed over, H query heads, G KV heads,
D head width, L layers.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from pdtrim.errors import PlanError
from pdtrim.kv.selectors import kept_runs
from pdtrim.models.model import Model
from pdtrim.plan import Frozen, LayerKV, first_problem
from pdtrim.stage.forward import Batch, Trace

HEADS_NEEDED = 0.5


class KVRequest(Frozen):
    """What the user asked for."""

    selector: Literal["full", "first_last"]
    first: int = Field(default=4, ge=0)
    last: int = Field(default=60, ge=0)
    layers: int | Literal["all", "auto"] = "auto"
    cutoff: float = Field(default=0.8, gt=0, le=1)

    @classmethod
    def parse(cls, text: str) -> KVRequest:
        """Read the grammar above.

        Raises:
            PlanError: unknown policy, option or value.
        """
        name, _, rest = text.partition(":")
        options: dict[str, object] = {"selector": name}
        for item in filter(None, rest.split(",")):
            key, equals, value = item.partition("=")
            if not equals:
                raise PlanError(f"KV policy '{text}': '{item}' is not option=value")
            options[key] = value
        if isinstance(options.get("layers"), str) and str(options["layers"]).isdecimal():
            options["layers"] = int(str(options["layers"]))
        try:
            request = cls.model_validate(options)
        except ValidationError as error:
            raise PlanError(f"KV policy '{text}': {first_problem(error)}") from error
        if name == "full" and rest:
            raise PlanError("KV policy 'full' takes no options")
        return request

    def resolve(
        self, model: Model, batch: Batch, trace: Trace, *, block_size: int = 1
    ) -> tuple[LayerKV, ...]:
        """One rule a layer.

        Args:
            batch, trace: calibration text and the dense model's streams on it.
        """
        count = model.num_layers
        if self.selector == "full":
            return (LayerKV(),) * count
        if isinstance(self.layers, int) and self.layers > count:
            raise PlanError(f"KV policy: layers={self.layers}, but the model has {count}")
        try:
            cut = LayerKV(selector="first_last", first=self.first, last=self.last)
        except ValidationError as error:
            raise PlanError(f"KV policy: {first_problem(error)}") from error
        selected = set(range(count))
        if self.layers != "all":
            mass_LH = concentration(model, batch, trace, cut, block_size=block_size)
            selected = set(self._select(mass_LH))
        return tuple(cut if i in selected else LayerKV() for i in range(count))

    def _select(self, mass_LH: Tensor) -> list[int]:
        heads_L = (mass_LH >= self.cutoff).double().mean(1)
        if self.layers == "auto":
            return [i for i, share in enumerate(heads_L.tolist()) if share >= HEADS_NEEDED]
        # most concentrated heads first, the mean mass breaks ties
        order = (heads_L + mass_LH.double().mean(1) * 1e-6).argsort(descending=True, stable=True)
        assert isinstance(self.layers, int)
        return sorted(order[: self.layers].tolist())


@torch.inference_mode()
def concentration(
    model: Model, batch: Batch, trace: Trace, rule: LayerKV, *, block_size: int = 1
) -> Tensor:
    """Share of each head's attention to the prompt that a rule's tokens receive, ``[L, H]``."""
    N = batch.prompt_BP.shape[1] - 1
    C = batch.continuation_BC.shape[1]
    at = torch.arange(N + C, device=model.device)[None]
    kept = torch.zeros(N, dtype=torch.bool, device=model.device)
    for start, stop in kept_runs(rule, N, block_size=block_size):
        kept[start:stop] = True
    rows = []
    for layer in range(model.num_layers):
        block = model.block(layer)
        x, y = trace[layer]
        k_BGND, _ = block.project_kv(block.attention_norm(x), model.rope(at[:, :N]))
        q_BHCD = block.project_q(block.attention_norm(y), model.rope(at[:, N:]))
        B, G, _, D = k_BGND.shape
        q_BGRCD = q_BHCD.view(B, G, -1, C, D)
        scores = torch.einsum("bgrcd,bgnd->bgrcn", q_BGRCD, k_BGND).float() * block.scale
        mass_BGR = scores.softmax(-1)[..., kept].sum(-1).mean(-1)
        rows.append(mass_BGR.flatten(1).mean(0))
    return torch.stack(rows).cpu()
