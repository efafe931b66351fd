"""Repair the cuts of both stages, from the first layer to the last, and choose among repairs.

Each stage is repaired toward the dense model's streams on the tokens it sees: prefill on the
prompt, decode on the continuation. The inputs of a fit are the streams of the pruned pair under its
KV policy, with the earlier cuts repaired, so a fit also corrects what they left.

Cuts are runs of whole blocks; see ``cuts.py``. A removed attention or MLP alone is not repaired,
and ``diagonal`` and ``linear`` need a kept MLP right before the cut. Where several layers read the
stream of one cut, the target is the mean of the dense streams there: in squares it is their best.
``kv`` fits the projections of blocks that prefill skips but computes keys and values for, alone or
behind ``linear``.
Tokens count by their squares, not alike: the few with huge channels (attention sinks) must come
through unharmed, and a fit to relative errors spoils them.

Shapes: B batch, N prompt tokens, C continuation tokens, E hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pdtrim.calibration.teacher import Teacher
from pdtrim.errors import PdtrimError
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.models.model import Model
from pdtrim.models.replace import Weights
from pdtrim.plan import STAGES, Gates, LayerKV, Stage
from pdtrim.repair import diagonal, kv, linear, scalar
from pdtrim.repair.cuts import Cut, find_cuts
from pdtrim.stage.forward import Batch, Pair, Trace, streams
from pdtrim.stage.replaced import swap_pair

Kind = Literal["none", "scalar", "diagonal", "linear", "kv", "linear+kv"]
KINDS: dict[Stage, tuple[Kind, ...]] = {
    "prefill": ("none", "scalar", "diagonal", "linear", "kv", "linear+kv"),
    "decode": ("none", "scalar", "diagonal", "linear"),
}
Blocks = dict[Stage, dict[int, Weights]]
RIDGE = 1.0
"""Chosen on SmolLM2-135M: on 3000 tokens, ``linear`` with 0.03 already does harm on other text."""
KV_RIDGE = 0.1
"""Of ``kv``; on 6000 tokens 0.03 to 0.3 differ by 5 % of what is gained."""
ROWS = 8  # sequences run together


@torch.no_grad()  # not inference mode: the weights it makes are used outside of it
def repair(
    model: Model,
    gates: Gates,
    policy: HandoverPolicy,
    batch: Batch,
    kind: Kind,
    *,
    stages: Sequence[Stage] = STAGES,
    pair: Pair | None = None,
    ridge: float = RIDGE,
    kv_ridge: float = KV_RIDGE,
) -> Blocks:
    """Weights that repair a pruned pair, by stage and dense layer index; what is not there stays.

    Args:
        model: the dense model, whose streams are the targets.
        batch: text to fit on.
        stages: whose cuts are repaired.
        pair: what the stages run, whole models; None is the dense model in both roles.
        ridge: of ``diagonal`` and ``linear``, relative to the data; infinite repairs nothing.
        kv_ridge: of ``kv``, likewise.

    Raises:
        PdtrimError: an unknown kind, or a ridge that is not above 0.
    """
    if kind not in KINDS["prefill"]:
        raise PdtrimError(f"unknown repair '{kind}': use one of {', '.join(KINDS['prefill'])}")
    if not (ridge > 0 and kv_ridge > 0):
        raise PdtrimError(f"ridges {ridge} and {kv_ridge} must be above 0")
    if kind == "none":
        return {"prefill": {}, "decode": {}}
    gates = gates.without_dead_work()
    cuts = [cut for stage in stages for cut in find_cuts(gates, stage)]
    walk = _Walk(model, pair or Pair.dense(model), gates, policy, batch, cuts)
    if kind == "scalar":
        _repair_scalar(walk, cuts)
    elif kind != "kv":
        _repair_mlp(walk, cuts, diagonal.fit if kind == "diagonal" else linear.fit, ridge)
    if kind in ("kv", "linear+kv") and "prefill" in stages:
        made = walk.made
        walk = _Walk(model, walk.pair, gates, policy, batch, cuts)
        walk.made = made
        _repair_kv(walk, model, kv_ridge)
    return walk.made


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """The repair of each stage with the least KL on text that no fit has seen.

    Attributes:
        kl: of the repaired pair, nats a continuation token, over the dense model's top tokens.
        tried: that of each kind, by stage; decode's are tried on prefill's best.
    """

    kinds: dict[Stage, Kind]
    blocks: Blocks
    kl: float
    tried: dict[Stage, dict[Kind, float]]

    @property
    def text(self) -> str:
        """In words."""
        done = [f"{stage} {kind}" for stage, kind in self.kinds.items() if kind != "none"]
        return ", ".join(done) or "none"


@torch.no_grad()
def best_repair(
    model: Model,
    gates: Gates,
    policy: HandoverPolicy,
    fit: Batch,
    held_out: Batch,
    kinds: Mapping[Stage, Sequence[Kind]] = KINDS,
    *,
    pair: Pair | None = None,
    ridge: float = RIDGE,
) -> Repaired:
    """Choose each stage's repair, prefill's first; no repair is a choice too, and wins a tie.

    Args:
        pair: what the stages run; None is the dense model in both roles.
    """
    held_out = held_out.to(model.device)
    parts = [held_out[i : i + ROWS] for i in range(0, len(held_out), ROWS)]
    teachers = [Teacher.of(model, part) for part in parts]

    def measure(pair: Pair) -> float:
        kl_B = [
            teacher.kl(pair.decode, streams(pair, part, gates, policy)[-1][1])
            for teacher, part in zip(teachers, parts, strict=True)
        ]
        return float(torch.cat(kl_B).mean())

    pair = pair or Pair.dense(model)
    kl = measure(pair)
    best: dict[Stage, Kind] = {}
    blocks: Blocks = {"prefill": {}, "decode": {}}
    tried: dict[Stage, dict[Kind, float]] = {}
    for stage in STAGES:
        best[stage], tried[stage] = "none", {"none": kl}
        start = pair
        for kind in kinds[stage] if find_cuts(gates, stage) else ():
            if kind == "none":
                continue
            made = repair(model, gates, policy, fit, kind, stages=(stage,), pair=start, ridge=ridge)
            repaired = swap_pair(start, made)
            tried[stage][kind] = measure(repaired)
            if tried[stage][kind] < kl:
                kl, pair = tried[stage][kind], repaired
                best[stage], blocks[stage] = kind, made[stage]
    return Repaired(kinds=best, blocks=blocks, kl=kl, tried=tried)


def _repair_scalar(walk: _Walk, cuts: Sequence[Cut]) -> None:
    """Divide the writes behind each cut by its gain, up to the next cut of the stage."""
    last_write = {"prefill": walk.gates.last_read - 1, "decode": walk.gates.num_layers - 1}
    for cut in sorted(cuts, key=lambda cut: cut.stop):
        if cut.stop > last_write[cut.stage]:
            continue
        walk.go_to(cut.stop)
        gain = scalar.fit(walk.streams_and_targets(cut.stage, (cut.stop,)))
        later = [c.first for c in cuts if c.stage == cut.stage and c.first > cut.stop]
        for layer in range(cut.stop, min([*later, last_write[cut.stage] + 1])):
            walk.swap(cut.stage, layer, scalar.fold(walk.weights(cut.stage, layer), gain))


def _repair_mlp(walk: _Walk, cuts: Sequence[Cut], fit: Callable[..., Tensor], ridge: float) -> None:
    """Fit a matrix behind the MLP before each cut, and fold it in."""
    foldable = [c for c in cuts if c.first > 0 and walk.gates.of(c.stage)[1][c.keeper]]
    for keeper in sorted({cut.keeper for cut in foldable}):
        walk.go_to(keeper)
        for cut in foldable:
            if cut.keeper == keeper:
                w_EE = fit(walk.outputs_and_targets(cut), ridge=ridge)
                walk.swap(cut.stage, keeper, linear.fold(walk.weights(cut.stage, keeper), w_EE))


def _repair_kv(walk: _Walk, model: Model, ridge: float) -> None:
    """Fit the projections of each block that prefill skips; no stream changes by it."""
    for layer, gate in enumerate(walk.gates.prefill_attention):
        if gate == "kv":
            walk.go_to(layer)
            own = walk.weights("prefill", layer)
            projections = {name: own[name] for name in kv.PROJECTIONS}
            pairs = walk.normed_and_targets(model, layer)
            walk.swap("prefill", layer, kv.fit(pairs, projections, ridge=ridge))


class _Walk:
    """The pruned pair on its way through the layers, repaired as it goes.

    Attributes:
        made: weights that were swapped in so far.
    """

    def __init__(
        self,
        model: Model,
        pair: Pair,
        gates: Gates,
        policy: HandoverPolicy,
        batch: Batch,
        cuts: Sequence[Cut],
    ) -> None:
        self.pair, self.gates, self.policy = pair, gates.without_dead_work(), policy
        batch = batch.to(model.device)
        self.parts = [batch[i : i + ROWS] for i in range(0, len(batch), ROWS)]
        self.made: Blocks = {"prefill": {}, "decode": {}}
        self.at = 0
        self.traces: list[Trace | None] = [None] * len(self.parts)
        targets = {layer for cut in cuts for layer in (*cut.readers, cut.stop)}
        targets |= {i for i, gate in enumerate(self.gates.prefill_attention) if gate == "kv"}
        self.dense: list[dict[int, tuple[Tensor, Tensor]]] = []
        for part in self.parts:
            trace = streams(Pair.dense(model), part, Gates.dense(model.num_layers))
            self.dense.append({layer: trace[layer] for layer in targets})

    def go_to(self, layer: int) -> None:
        """Run on to the streams that enter a layer."""
        self.traces = [
            self._run(part, trace, layer, self.gates)
            for part, trace in zip(self.parts, self.traces, strict=True)
        ]
        self.at = layer

    def streams_and_targets(
        self, stage: Stage, readers: tuple[int, ...]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The stream of a stage here and the dense one at the readers, ``[R, E]``, part by part."""
        for trace, dense in zip(self.traces, self.dense, strict=True):
            assert trace is not None
            yield _rows(trace[self.at], stage), _target(dense, stage, readers)

    def outputs_and_targets(self, cut: Cut) -> Iterator[tuple[Tensor, Tensor]]:
        """What the MLP of this layer writes, and what it should write, ``[R, E]``, part by part."""
        model = self.pair.prefill if cut.stage == "prefill" else self.pair.decode
        off = tuple(on and layer != self.at for layer, on in enumerate(self.gates.of(cut.stage)[1]))
        gates = self.gates.model_copy(update={f"{cut.stage}_mlp": off})
        for part, trace, dense in zip(self.parts, self.traces, self.dense, strict=True):
            y_RE = _rows(self._run(part, trace, self.at + 1, gates)[-1], cut.stage)
            m_RE = model.block(self.at).mlp(y_RE[None])[0]
            yield m_RE, _target(dense, cut.stage, cut.readers) - y_RE.float()

    def normed_and_targets(self, model: Model, layer: int) -> Iterator[tuple[Tensor, Tensor]]:
        """A prefill block's normed input here and in the dense model, ``[R, E]``, part by part."""
        for trace, dense in zip(self.traces, self.dense, strict=True):
            assert trace is not None
            here, there = _rows(trace[layer], "prefill"), _rows(dense[layer], "prefill")
            norm = model.block(layer).attention_norm
            yield norm(here), norm(there)

    def weights(self, stage: Stage, layer: int) -> Weights:
        """Parameters of a block as the pair has them now."""
        model = self.pair.prefill if stage == "prefill" else self.pair.decode
        return {name: part.detach() for name, part in model.block(layer).module.named_parameters()}

    def swap(self, stage: Stage, layer: int, weights: Weights) -> None:
        """Put other weights in place."""
        self.made[stage].setdefault(layer, {}).update(weights)
        self.pair = swap_pair(self.pair, {stage: {layer: weights}})

    def _run(self, part: Batch, trace: Trace | None, stop: int, gates: Gates) -> Trace:
        """The trace up to the streams that enter layer ``stop``."""
        if trace is not None and stop == self.at:
            return trace
        policy = HandoverPolicy(
            rules=(*self.policy.rules[:stop], LayerKV()), block_size=self.policy.block_size
        )
        ends = _ending(gates, stop)
        return streams(self.pair, part, ends, policy, resume=trace, start=self.at)[: stop + 1]


def _ending(gates: Gates, stop: int) -> Gates:
    """Gates of the layers before ``stop``, and a reader there: without one prefill would stop."""
    return Gates(
        prefill_attention=(*gates.prefill_attention[:stop], "kv"),
        prefill_mlp=(*gates.prefill_mlp[:stop], False),
        decode_attention=(*gates.decode_attention[:stop], True),
        decode_mlp=(*gates.decode_mlp[:stop], False),
    )


def _rows(entry: tuple[Tensor, Tensor], stage: Stage) -> Tensor:
    """A stage's stream of a trace entry, all sequences below one another, ``[R, E]``."""
    return entry[0 if stage == "prefill" else 1].flatten(0, 1)


def _target(
    dense: Mapping[int, tuple[Tensor, Tensor]], stage: Stage, readers: tuple[int, ...]
) -> Tensor:
    """Mean of the dense streams that enter the readers, ``[R, E]``, fp32."""
    return torch.stack([_rows(dense[layer], stage).float() for layer in readers]).mean(0)
