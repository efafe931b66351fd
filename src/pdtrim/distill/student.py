"""The weights of a stage that train: fp32 masters with Adam, behind a model in the compute type.

A small update to a bf16 weight is lost in rounding, so the updates go to fp32 masters, and the
network computes with their rounded copies (mixed precision, 1710.03740).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pdtrim.distill.schedule import rate_share
from pdtrim.finite import finite
from pdtrim.models.model import Model
from pdtrim.models.swap import Weights, swap_blocks

Compute = Literal["bfloat16", "float32"]
DTYPES: dict[Compute, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CLIP = 1.0  # largest norm of a step's gradient


@dataclass(frozen=True, kw_only=True)
class Descent:
    """How far and how fast the weights move.

    Attributes:
        warmup: share of the steps in which the learning rate rises; then it falls to 0 by a cosine.
        weight_decay: of matrices; norms and biases have none.
    """

    steps: int = 1000
    learning_rate: float = 1e-4
    warmup: float = 0.05
    weight_decay: float = 0.0


def frozen(model: Model, dtype: torch.dtype) -> Model:
    """The model in a type to compute in, its weights out of reach of autograd.

    Weights that are of the type already are shared. Buffers are shared as they are: rotary
    frequencies stay fp32.
    """
    parts: dict[int, object] = {
        id(p): nn.Parameter(p.detach().to(dtype), requires_grad=False)
        for p in model.network.parameters()
    }
    parts.update({id(buffer): buffer for buffer in model.network.buffers()})
    network = copy.deepcopy(model.network, parts)
    return Model(network, model.tokenizer, name=model.name, revision=model.revision)


class Student:
    """A stage's model of which some weights train.

    Args:
        model: where the weights start, in the type they are kept in.
        base: the same, ``frozen`` in the compute type; the blocks that do not train are its own.
        names: parameters that train, by layer.
        start: weights that stand in place of the model's.

    Raises:
        ValueError: ``start`` does not fit the model.
    """

    def __init__(
        self,
        model: Model,
        base: Model,
        names: Mapping[int, Sequence[str]],
        start: Mapping[int, Weights],
        descent: Descent,
    ) -> None:
        self.layers = tuple(names)
        self.masters: dict[str, Tensor] = {}
        blocks = {layer: dict(weights) for layer, weights in start.items()}
        for layer, chosen in names.items():
            weights = blocks.setdefault(layer, {})
            for name in chosen:
                tensor = model.block(layer).module.get_parameter(name)
                master = weights.get(name, tensor).detach().to(model.device, torch.float32)
                self.masters[f"{layer}.{name}"] = master.clone()
                weights[name] = master.to(base.dtype, copy=True)
        self.model = swap_blocks(base, blocks)
        self._copies = {
            key: self.model.block(layer).module.get_parameter(name).requires_grad_()
            for key, layer, name in _split(self.masters)
        }
        self.descent = descent
        self._adam = self._make_adam()

    def _make_adam(self) -> torch.optim.AdamW:
        matrices: list[Tensor] = []
        others: list[Tensor] = []
        for master in self.masters.values():
            master.grad = torch.zeros_like(master)
            (matrices if master.dim() > 1 else others).append(master)
        groups = [
            {"params": matrices, "weight_decay": self.descent.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([g for g in groups if g["params"]], fused=True)

    def collect(self) -> None:
        """Add the gradients of a backward pass to the masters', in fp32."""
        for key, weight in self._copies.items():
            if weight.grad is not None:
                self.masters[key].grad += weight.grad
                weight.grad = None

    def step(self, step: int) -> None:
        """One update with what was collected, at the learning rate of step ``step`` (from 0).

        Raises:
            PdtrimError: the gradient is NaN or infinite; nothing was updated.
        """
        norm = nn.utils.clip_grad_norm_(self.masters.values(), CLIP)
        finite(norm, f"the gradient of step {step + 1}")
        descent = self.descent
        share = rate_share(step, descent.steps, descent.warmup)
        for group in self._adam.param_groups:
            group["lr"] = descent.learning_rate * share
        self._adam.step()
        self._adam.zero_grad(set_to_none=False)
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        for key, weight in self._copies.items():
            weight.copy_(self.masters[key])

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Stand at other weights, by ``layer.name``, before the first step."""
        for key, tensor in weights.items():
            self.masters[key].copy_(tensor)
        self._publish()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Everything that ``load`` needs: the masters and Adam's two averages."""
        out: dict[str, dict[str, Tensor]] = {"weight": self.masters, "mean": {}, "square": {}}
        for key, master in self.masters.items():
            adam = self._adam.state[master]
            if adam:  # empty before the first step
                out["mean"][key], out["square"][key] = adam["exp_avg"], adam["exp_avg_sq"]
        return out

    def load(self, state: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """Stand where a student stood after ``step`` steps."""
        for key, master in self.masters.items():
            master.copy_(state["weight"][key])
            if step:
                self._adam.state[master] = {
                    "step": torch.tensor(float(step), device=master.device),
                    "exp_avg": state["mean"][key].to(master.device),
                    "exp_avg_sq": state["square"][key].to(master.device),
                }
        self._publish()

    def copy_weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The masters as they are now, by ``layer.name``."""
        return {key: master.to(dtype, copy=True) for key, master in self.masters.items()}


def by_layer(weights: Mapping[str, Tensor]) -> dict[int, Weights]:
    """``layer.name`` keys taken apart."""
    blocks: dict[int, Weights] = {}
    for key, layer, name in _split(weights):
        blocks.setdefault(layer, {})[name] = weights[key]
    return blocks


def _split(keys: Iterable[str]) -> list[tuple[str, int, str]]:
    parts = ((key, *key.split(".", 1)) for key in keys)
    return [(key, int(layer), name) for key, layer, name in parts]
