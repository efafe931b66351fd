"""A plan's KV policy at work: which pairs of a layer travel, and what decode sees of them.

The simulator and the real processes share these functions, so they cannot disagree. Dropped pairs
are gone, never zeroed: a zero key would still take softmax mass.

Shapes: B rows, G KV heads, N prompt tokens handed over, g heads of a group, M kept tokens of a
group's fullest row, D head width.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pdtrim.kv.bearable import check_bearable
from pdtrim.kv.bias import KVBias, Table
from pdtrim.kv.codecs import CodecBase
from pdtrim.kv.groups import HeadGroup
from pdtrim.kv.selectors import Full, StaticSelector
from pdtrim.kv.view import LayerView
from pdtrim.plan import LayerKV, PrunePlan


@dataclass(frozen=True, kw_only=True)
class HandoverPolicy:
    """One rule a layer, the page size they round to, and the heads that they are for.

    Attributes:
        places: of the KV heads that prefill makes of a layer, those that travel, because decode
            has them too; None is all, and so is an empty tuple for all layers.
    """

    rules: tuple[LayerKV, ...]
    block_size: int = 1
    places: tuple[tuple[int, ...] | None, ...] = ()

    @classmethod
    def of(cls, plan: PrunePlan) -> HandoverPolicy:
        """The policy of a plan."""
        return cls(rules=plan.kv, block_size=plan.block_size, places=_places(plan))

    @classmethod
    def full(cls, num_layers: int) -> HandoverPolicy:
        """Everything travels."""
        return cls(rules=(LayerKV(),) * num_layers)

    def of_layer(self, layer: int) -> tuple[Hashable, ...]:
        """All that the handover of a layer depends on."""
        places = self.places[layer] if self.places else None
        return self.rules[layer], self.block_size, places

    def share(self, layer: int, heads: int, tokens: int) -> float:
        """Share of a layer's pairs that travel; 1, the most, where each prompt decides anew."""
        selector = self.rules[layer].selector
        if not isinstance(selector, StaticSelector) or tokens == 0:
            return 1.0
        keep_GN = selector.static_keep(heads, tokens, block_size=self.block_size)
        return float(keep_GN.double().mean())


def _places(plan: PrunePlan) -> tuple[tuple[int, ...] | None, ...]:
    if plan.widths is None:
        return ()
    places: list[tuple[int, ...] | None] = [None] * plan.model.num_layers
    for layer in plan.sent_layers:
        sent = plan.sent_places(layer)
        if len(sent) < len(plan.kv_heads("prefill", layer)):
            places[layer] = sent
    return tuple(places)


def partition(counts_BG: Tensor) -> list[tuple[int, ...]]:
    """Heads by their kept counts in all rows; groups in the order of their first head."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for head, counts in enumerate(counts_BG.T.tolist()):
        groups.setdefault(tuple(counts), []).append(head)
    return [tuple(heads) for heads in groups.values()]


def gather(view: LayerView, keep_BGN: Tensor) -> list[HeadGroup]:
    """The kept pairs of a layer, its heads grouped by how many they keep."""
    counts_BG = keep_BGN.sum(-1)
    groups = []
    for heads in partition(counts_BG):
        rows = list(heads)
        counts_B = counts_BG[:, rows[0]]
        M = int(counts_B.max())
        keep = keep_BGN[:, rows]
        positions_BgM = keep.byte().argsort(dim=-1, descending=True, stable=True)[..., :M]
        at = positions_BgM[..., None].expand(-1, -1, -1, view.k_BGND.shape[-1])
        groups.append(
            HeadGroup(
                heads=heads,
                k_BgMD=view.k_BGND[:, rows].gather(2, at),
                v_BgMD=view.v_BGND[:, rows].gather(2, at),
                positions_BgM=positions_BgM,
                padded_BM=padding(counts_B, M),
            )
        )
    return groups


def padding(counts_B: Tensor, longest: int) -> Tensor | None:
    """Where rows are shorter than the longest, bool ``[B, M]``; None if none is."""
    if int(counts_B.min()) == longest:
        return None
    return torch.arange(longest, device=counts_B.device)[None] >= counts_B[:, None]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a layer's rule keeps of a prompt, as its codec takes it.

    Attributes:
        keep_BGN: which pairs travel, bool.
        groups: those pairs; without what projections' biases add, if the codec rounds.
        bias, rope: of the biases that were taken off; None if there are none.
    """

    layer: int
    codec: CodecBase
    keep_BGN: Tensor
    groups: list[HeadGroup]
    bias: KVBias | None
    rope: Table | None

    def check(self) -> None:
        """Refuse pairs that the codec cannot hold.

        Raises:
            NotFinite: some are no numbers, or beyond the codec's range.
        """
        for group in self.groups:
            check_bearable(self.layer, self.codec, group)

    def coded(self) -> list[HeadGroup]:
        """What decode sees of them: through the codec and back.

        Raises:
            NotFinite: as :meth:`check`, for a codec that rounds; what others leave alone shows in
                the loss.
        """
        if self.codec.exact:
            return self.groups
        self.check()
        groups = [through(self.codec, group) for group in self.groups]
        if self.bias is None or self.rope is None:
            return groups
        return [self.bias.added_to(group, self.rope) for group in groups]


def select(policy: HandoverPolicy, layer: int, view: LayerView) -> Kept:
    """Which pairs of a layer travel, and those.

    Args:
        view: with all heads that prefill makes.
    """
    rule, places = policy.rules[layer], policy.places[layer] if policy.places else None
    seen = view if places is None else view.heads(places)
    if isinstance(rule.selector, Full):
        groups = [whole(seen)]
        shape = seen.k_BGND.shape[:3]
        keep_BGN = torch.ones((), dtype=torch.bool, device=seen.k_BGND.device).expand(shape)
    else:
        with torch.no_grad():  # which pairs travel has no gradient
            keep_BGN = rule.selector.keep(seen, block_size=policy.block_size)
        groups = gather(seen, keep_BGN)
    bias, rope = (None if rule.codec.exact else seen.bias()), None
    if bias is not None:
        cos, sin = seen.rope(torch.arange(seen.k_BGND.shape[2], device=seen.k_BGND.device))
        rope = cos[0], sin[0]
        groups = [bias.taken_from(group, rope) for group in groups]
    return Kept(
        layer=layer, codec=rule.codec, keep_BGN=keep_BGN, groups=groups, bias=bias, rope=rope
    )


def hand_over(policy: HandoverPolicy, layer: int, view: LayerView) -> list[HeadGroup]:
    """What decode sees of a layer: the kept pairs, through the codec and back."""
    return select(policy, layer, view).coded()


def whole(view: LayerView) -> HeadGroup:
    """All pairs of a layer, without looking for them or copying them."""
    B, G, N, _ = view.k_BGND.shape
    at_N = torch.arange(N, device=view.k_BGND.device)
    return HeadGroup(
        heads=tuple(range(G)),
        k_BgMD=view.k_BGND,
        v_BgMD=view.v_BGND,
        positions_BgM=at_N.expand(B, G, N),
    )


def through(codec: CodecBase, group: HeadGroup) -> HeadGroup:
    """A group encoded and decoded; each row by itself where rows differ in length.

    Its gradient is that of the group as it was: rounding has none.
    """
    B, g, M, D = group.k_BgMD.shape
    if group.padded_BM is None:
        flat = (x.reshape(B * g, M, D) for x in (group.k_BgMD, group.v_BgMD))
        k, v = (x.view(B, g, M, D) for x in codec.round_trip(*flat))
    else:
        k, v = group.k_BgMD.detach().clone(), group.v_BgMD.detach().clone()
        for row, count in enumerate((~group.padded_BM).sum(1).tolist()):
            k[row, :, :count], v[row, :, :count] = codec.round_trip(
                group.k_BgMD[row, :, :count], group.v_BgMD[row, :, :count]
            )
    return replace(group, k_BgMD=_straight(group.k_BgMD, k), v_BgMD=_straight(group.v_BgMD, v))


def _straight(x: Tensor, coded: Tensor) -> Tensor:
    """What came through the codec, bit for bit, with the gradient of what went in (1308.3432)."""
    return coded + (x - x.detach()) if x.requires_grad else coded
