"""Repair what both stages lost, from the first layer to the last, and choose among repairs.

Each stage is repaired toward the dense model's streams on the tokens it sees: prefill on the
prompt, decode on the continuation. The inputs of a fit are the streams of the pruned pair under its
KV policy, with the earlier repairs in place, so a fit also corrects what they left.

``scalar``, ``diagonal`` and ``linear`` repair cuts, which are runs of whole blocks (``cuts.py``);
the latter two need a kept MLP right before the cut. ``outputs`` fits all that a stage keeps from
its first change on, be that a block, an attention, an MLP or a part of them. Where several layers
read the stream of one cut, the target is the mean of the dense streams there: in squares it is
their best. ``kv`` fits the projections of blocks that prefill skips but computes keys and values
for, alone or behind ``linear`` or ``outputs``.
The loss is the absolute squared error, so tokens with large activations weigh more: attention sinks
must come through unharmed, and a fit to relative errors spoils them.

Shapes: E hidden width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from pdtrim.errors import PdtrimError
from pdtrim.models.block import KEYS_AND_VALUES, OUTPUTS
from pdtrim.models.model import Model
from pdtrim.models.swap import Blocks, Weights, joined
from pdtrim.plan import STAGES, Gates, Stage
from pdtrim.repair import diagonal, kv, linear, outputs, scalar
from pdtrim.repair.cuts import Cut, find_cuts, readers, writes
from pdtrim.repair.dense import DenseText
from pdtrim.repair.held_out import HeldOut, Score
from pdtrim.repair.walk import Walk
from pdtrim.stage.forward import Batch, Trimmed
from pdtrim.stage.swap import swap_pair

Kind = Literal[
    "none",
    "scalar",
    "diagonal",
    "linear",
    "outputs",
    "kv",
    "linear+kv",
    "outputs+kv",
    "shared",
    "shared+kv",
]
KINDS: dict[Stage, tuple[Kind, ...]] = {
    "prefill": ("none", "scalar", "diagonal", "linear", "outputs", "kv", "linear+kv", "outputs+kv"),
    "decode": ("none", "scalar", "diagonal", "linear", "outputs"),
}
"""What repairs one stage."""
SHARED: tuple[Kind, ...] = ("shared", "shared+kv")
"""What repairs both at once."""
_KIND: dict[str, Kind] = {kind: kind for kind in (*KINDS["prefill"], *SHARED)}
RIDGE = 1.0
"""Chosen on SmolLM2-135M: on 3000 tokens, ``linear`` with 0.03 already does harm on other text."""
OUTPUTS_RIDGE = 0.3
"""Of ``outputs`` and ``shared``."""
KV_RIDGE = 0.1
"""Of ``kv``; on 6000 tokens 0.03 to 0.3 differ by 5 % of what is gained."""
KEYS = (0.75, 0.5)
"""Shares of the way that fitted keys may go, beside all of it."""


@torch.no_grad()  # not inference mode: the weights it makes are used outside of it
def repair(
    model: Model,
    trimmed: Trimmed,
    batch: Batch | DenseText,
    kind: Kind,
    *,
    stages: Sequence[Stage] = STAGES,
    ridge: float = RIDGE,
    outputs_ridge: float = OUTPUTS_RIDGE,
    kv_ridge: float = KV_RIDGE,
    begun: Blocks | None = None,
) -> Blocks:
    """Weights that repair a pruned pair, by stage and dense layer index; what is not there stays.

    Args:
        model: the dense model, whose streams are the targets.
        trimmed: the pair as it is pruned; whole models with gates.
        batch: text to fit on; one that was fitted to before has the dense streams already.
        stages: what is repaired; the shared kinds need both.
        ridge: of ``diagonal`` and ``linear``, relative to the data; infinite repairs nothing.
        outputs_ridge: of ``outputs`` and ``shared``, likewise, but biases are fitted without.
        kv_ridge: of ``kv``, likewise.
        begun: what the first part of a kind such as ``linear+kv`` made, if it is known.

    Raises:
        PdtrimError: an unknown kind, or a ridge that is not above 0.
    """
    if kind not in _KIND:
        raise PdtrimError(f"unknown repair '{kind}': use one of {', '.join(_KIND)}")
    if not (ridge > 0 and outputs_ridge > 0 and kv_ridge > 0):
        raise PdtrimError(f"ridges {ridge}, {outputs_ridge} and {kv_ridge} must be above 0")
    if kind == "none":
        return {"prefill": {}, "decode": {}}
    text = batch if isinstance(batch, DenseText) else DenseText(model, batch, stages=stages)
    what, _, then = kind.partition("+")
    if then:
        part = partial(
            repair,
            model,
            batch=text,
            stages=stages,
            ridge=ridge,
            outputs_ridge=outputs_ridge,
            kv_ridge=kv_ridge,
        )
        first = part(trimmed=trimmed, kind=_KIND[what]) if begun is None else begun
        return joined(first, part(trimmed=_with(trimmed, first), kind=_KIND[then]))
    walk = Walk(trimmed, text, stages)
    cuts = [cut for stage in stages for cut in find_cuts(trimmed.gates, stage)]
    if kind == "scalar":
        _repair_scalar(walk, cuts)
    elif kind in ("diagonal", "linear"):
        _repair_mlp(walk, cuts, diagonal.fit if kind == "diagonal" else linear.fit, ridge)
    elif kind in ("outputs", "shared"):
        changed = {stage: first_change(model, trimmed, stage) for stage in stages}
        begin = {stage: i for stage, i in changed.items() if i is not None}
        _repair_outputs(walk, begin, outputs_ridge, shared=kind == "shared")
    elif "prefill" in stages:
        _repair_kv(walk, kv_ridge)
    return walk.made


def first_change(model: Model, trimmed: Trimmed, stage: Stage) -> int | None:
    """The first layer in which a stage runs less than the dense model; None if it runs it all."""
    dense = Gates.dense(model.num_layers).without_dead_work().of(stage)
    own = trimmed.pair.of(stage)
    for layer, parts in enumerate(zip(*trimmed.gates.of(stage), *dense, strict=True)):
        if parts[:2] != parts[2:] or _shapes(own, layer) != _shapes(model, layer):
            return layer
    return None


def _shapes(model: Model, layer: int) -> dict[str, torch.Size]:
    module = model.block(layer).module
    return {name: part.shape for name, part in module.named_parameters()}


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """The repair of each stage with the least loss on text that no fit has seen.

    Attributes:
        keys: the share of the way that keys go where prefill's are fitted.
        score: of the repaired pair.
        tried: the loss of each kind, by stage; decode's are tried on prefill's best. Those of both
            stages at once stand with decode's.
    """

    kinds: dict[Stage, Kind]
    blocks: Blocks
    score: Score
    tried: dict[Stage, dict[Kind, float]]
    keys: float = 1.0

    @property
    def winners(self) -> dict[Stage, tuple[Kind, ...]]:
        """The kind that won in each stage, to choose from for a pair much like this one."""
        return {s: ("outputs",) if k in SHARED else (k,) for s, k in self.kinds.items()}

    @property
    def text(self) -> str:
        """In words."""
        done = [f"{stage} {kind}" for stage, kind in self.kinds.items() if kind != "none"]
        done += [f"keys {self.keys:g} of the way"] if self.keys < 1 else []
        return ", ".join(done) or "none"


@torch.no_grad()
def best_repair(
    model: Model,
    trimmed: Trimmed,
    fit: Batch | DenseText,
    held_out: Batch | HeldOut,
    kinds: Mapping[Stage, Sequence[Kind]] = KINDS,
    *,
    ridge: float = RIDGE,
    over: Callable[[], bool] = lambda: False,
) -> Repaired:
    """Choose each stage's repair, prefill's first, and then whether one of both stages is better.

    No repair is a choice too, and wins a tie. What one kind has made, the kinds that go on from it
    begin with. Where fitted keys have won, fewer steps of them are tried (``KEYS``).

    Args:
        trimmed: the pair as it is pruned.
        fit, held_out: what was repaired on them before has left the dense model's streams there.
        kinds: to choose from; the shared ones are tried where both stages have ``outputs``.
        over: whether there is no time for another kind; the best so far then stays.
    """
    changed = changed_stages(model, trimmed)
    text = fit if isinstance(fit, DenseText) else DenseText(model, fit, stages=changed or STAGES)
    judge = held_out if isinstance(held_out, HeldOut) else HeldOut(model, held_out)
    score, keys = judge.score(trimmed), 1.0
    best: dict[Stage, Kind] = {}
    blocks: Blocks = {"prefill": {}, "decode": {}}
    tried: dict[Stage, dict[Kind, float]] = {}
    for stage in STAGES:
        best[stage], tried[stage] = "none", {"none": score.loss}
        before = _with(trimmed, blocks)
        made: dict[str, Blocks] = {}
        for kind in kinds[stage] if stage in changed else ():
            if kind == "none" or not ("outputs" in kind or find_cuts(trimmed.gates, stage)):
                continue
            if over():
                break
            made[kind] = _made(model, before, text, kind, (stage,), made, ridge)
            found = judge.score(_with(before, made[kind]))
            tried[stage][kind] = found.loss
            if found.loss < score.loss:
                score, best[stage], blocks[stage] = found, kind, made[kind][stage]
        if stage == "prefill" and best[stage].endswith("kv"):
            blocks, score, keys = _fewer_keys(trimmed, judge, blocks, score, over)
    if len(changed) == len(STAGES) and all("outputs" in kinds[stage] for stage in STAGES):
        made = {}
        for kind in SHARED:
            if over():
                break
            made[kind] = _made(model, trimmed, text, kind, STAGES, made, ridge)
            found = judge.score(_with(trimmed, made[kind]))
            tried["decode"][kind] = found.loss
            if found.loss < score.loss:
                score, best, blocks, keys = found, dict.fromkeys(STAGES, kind), made[kind], 1.0
        if best["prefill"] == "shared+kv":
            blocks, score, keys = _fewer_keys(trimmed, judge, blocks, score, over)
    return Repaired(kinds=best, blocks=blocks, score=score, tried=tried, keys=keys)


def _fewer_keys(
    trimmed: Trimmed, judge: HeldOut, blocks: Blocks, score: Score, over: Callable[[], bool]
) -> tuple[Blocks, Score, float]:
    """A repair whose keys go as much of the way as is best, its score, and how much that is."""
    best = blocks, score, 1.0
    skipped = [i for i, gate in enumerate(trimmed.gates.prefill_attention) if gate == "kv"]
    for share in KEYS:
        if over():
            break
        part = {}
        for layer in skipped:
            block = trimmed.pair.prefill.block(layer)
            own = block.parameters_of(*KEYS_AND_VALUES)
            part[layer] = kv.part_way(block, own, blocks["prefill"][layer], share)
        made: Blocks = {**blocks, "prefill": {**blocks["prefill"], **part}}
        found = judge.score(_with(trimmed, made))
        if found.loss < best[1].loss:
            best = made, found, share
    return best


def changed_stages(model: Model, trimmed: Trimmed) -> tuple[Stage, ...]:
    """The stages that run less than the dense model, which are those that can be repaired."""
    return tuple(stage for stage in STAGES if first_change(model, trimmed, stage) is not None)


def _made(
    model: Model,
    before: Trimmed,
    text: DenseText,
    kind: Kind,
    stages: tuple[Stage, ...],
    done: dict[str, Blocks],
    ridge: float,
) -> Blocks:
    """One kind's weights; those of a kind that it goes on from are made once, for ``done``."""
    what, _, then = kind.partition("+")
    if then and what not in done:
        done[what] = repair(model, before, text, _KIND[what], stages=stages, ridge=ridge)
    begun = done[what] if then else None
    return repair(model, before, text, kind, stages=stages, ridge=ridge, begun=begun)


def _with(start: Trimmed, made: Blocks) -> Trimmed:
    return replace(start, pair=swap_pair(start.pair, made))


def _repair_scalar(walk: Walk, cuts: Sequence[Cut]) -> None:
    """Divide the writes behind each cut by its gain, up to the next cut of the stage."""
    last_write = {"prefill": walk.gates.last_read - 1, "decode": walk.gates.num_layers - 1}
    for cut in sorted(cuts, key=lambda cut: cut.stop):
        if cut.stop > last_write[cut.stage]:
            continue
        walk.go_to(cut.stop)
        gain = scalar.fit(walk.streams_and_targets(cut.stage, (cut.stop,)))
        later = [c.first for c in cuts if c.stage == cut.stage and c.first > cut.stop]
        for layer in range(cut.stop, min([*later, last_write[cut.stage] + 1])):
            walk.swap(cut.stage, layer, scalar.fold(walk.weights(cut.stage, layer, *OUTPUTS), gain))


def _repair_mlp(walk: Walk, cuts: Sequence[Cut], fit: Callable[..., Tensor], ridge: float) -> None:
    """Fit a matrix behind the MLP before each cut, and fold it in."""
    foldable = [c for c in cuts if c.first > 0 and walk.gates.of(c.stage)[1][c.keeper]]
    for keeper in sorted({cut.keeper for cut in foldable}):
        walk.go_to(keeper)
        for cut in foldable:
            if cut.keeper == keeper:
                w_EE = fit(walk.outputs_and_targets(cut), ridge=ridge)
                down = walk.weights(cut.stage, keeper, "mlp")
                walk.swap(cut.stage, keeper, linear.fold(down, w_EE))


def _repair_outputs(
    walk: Walk, changed: Mapping[Stage, int], ridge: float, *, shared: bool
) -> None:
    """Fit the output projections that a stage runs from its first change on, if they are read.

    Where that is a missing block, the one before makes up for it.

    Args:
        changed: the first layer that each stage does not run whole.
        shared: where both stages are to be fitted in a projection and have the same weights there,
            they get the same new ones, fitted to the tokens of both.
    """
    gates, end = walk.gates, walk.gates.num_layers
    starts = {s: i if writes(gates, s)[i] else max(i - 1, 0) for s, i in changed.items()}
    for layer in range(min(starts.values(), default=end), end):
        walk.go_to(layer)
        begun = [stage for stage, start in starts.items() if layer >= start]
        for of_part, made_here in enumerate(OUTPUTS):
            name = walk.model.block(layer).making(made_here).name
            read = walk.o_and_targets if of_part == 0 else walk.down_and_targets
            runs = [
                stage
                for stage in begun
                if walk.gates.of(stage)[of_part][layer] in ("full", True)
                and readers(walk.gates, stage, layer)
            ]
            own = {stage: walk.weights(stage, layer, made_here) for stage in runs}
            together = shared and len(runs) > 1 and _same(*own.values())
            for stages in (runs,) if together else [[stage] for stage in runs]:
                pairs = itertools.chain.from_iterable(read(stage) for stage in stages)
                made = outputs.refit(pairs, own[stages[0]], name, ridge=ridge)
                for stage in stages:
                    walk.swap(stage, layer, made)


def _same(a: Weights, b: Weights) -> bool:
    """Whether two stages have the same weights."""
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def _repair_kv(walk: Walk, ridge: float) -> None:
    """Fit the projections of each block that prefill skips; no stream changes by it."""
    for layer, gate in enumerate(walk.gates.prefill_attention):
        if gate == "kv":
            walk.go_to(layer)
            block = walk.model.block(layer)
            own = walk.weights("prefill", layer, *KEYS_AND_VALUES)
            made = kv.fitted(block, own, walk.normed_and_targets(), ridge=ridge)
            walk.swap("prefill", layer, made)
