"""The simulator: teacher-forced prefill/decode inference of a batch, in one process.

It runs every block on the prompt under prefill's gates, cuts that block's keys and values as the
KV policy says, and runs the block on the continuation under decode's gates. Both go through
``stage/step.py``, as the real processes do, so this equals the real pair to rounding.

It also equals one ordinary causal forward of (prompt, continuation) in which a block adds its
residual on prompt tokens only if prefill runs it, and on the others only if decode does. The last
prompt token belongs to decode, which produces the first new token from it; prefill's logits are
never used.

Shapes: B batch, P prompt tokens, N = P - 1 of them prefilled, C continuation tokens, E hidden
width, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pdtrim.kv.groups import HeadGroup
from pdtrim.kv.layout import CacheLayout, masked
from pdtrim.kv.policy import HandoverPolicy, hand_over
from pdtrim.models.model import Model
from pdtrim.plan import Gates, PrunePlan, Stage
from pdtrim.stage.cache import LayerCache
from pdtrim.stage.step import decode_block, prefill_block
from pdtrim.stage.view import BlockView


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Prompts of one length and their continuations, token ids."""

    prompt_BP: Tensor
    continuation_BC: Tensor

    @property
    def prefill_ids_BN(self) -> Tensor:
        """What prefill reads: the prompt without its last token."""
        return self.prompt_BP[:, :-1]

    @property
    def decode_ids_BC(self) -> Tensor:
        """What decode reads to predict the continuation."""
        return torch.cat((self.prompt_BP[:, -1:], self.continuation_BC[:, :-1]), dim=1)

    @property
    def ids_BT(self) -> Tensor:
        """Whole sequences, ``[B, P + C]``."""
        return torch.cat((self.prompt_BP, self.continuation_BC), dim=1)

    def __getitem__(self, rows: slice | Tensor | list[int]) -> Batch:
        return Batch(prompt_BP=self.prompt_BP[rows], continuation_BC=self.continuation_BC[rows])

    def __len__(self) -> int:
        return self.prompt_BP.shape[0]

    def parts(self, rows: int) -> list[Batch]:
        """The batch in order, so many rows each; the last part may have fewer."""
        return [self[start : start + rows] for start in range(0, len(self), rows)]

    @classmethod
    def cut(cls, ids_BT: Tensor, prompt: int) -> Batch:
        """Sequences, each cut behind its prompt of so many tokens."""
        return cls(prompt_BP=ids_BT[:, :prompt], continuation_BC=ids_BT[:, prompt:])

    @classmethod
    def join(cls, parts: list[Batch]) -> Batch:
        """Batches of equal lengths below one another."""
        whole = torch.cat([part.ids_BT for part in parts])
        return cls.cut(whole, parts[0].prompt_BP.shape[1])

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return Batch(
            prompt_BP=self.prompt_BP.to(device), continuation_BC=self.continuation_BC.to(device)
        )


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The models of the two stages; before export both are the dense model."""

    prefill: Model
    decode: Model

    @classmethod
    def dense(cls, model: Model) -> Pair:
        """One model in both roles."""
        return cls(prefill=model, decode=model)

    def of(self, stage: Stage) -> Model:
        """One stage's model."""
        return self.prefill if stage == "prefill" else self.decode


Trace = list[tuple[Tensor, Tensor]]
"""Streams that enter each layer, and the last one's output: L + 1 pairs ``([B,N,E], [B,C,E])``.

Prefill's stream stands still behind the last layer whose KV decode reads.
"""


@dataclass(frozen=True, kw_only=True)
class Trimmed:
    """What runs and is measured: a pair, the gates it runs under, and what travels between them.

    Attributes:
        gates: without work that nobody reads; it is taken out here, once.
        policy: knows the heads that decode has of what prefill makes.
    """

    pair: Pair
    gates: Gates
    policy: HandoverPolicy

    def __post_init__(self) -> None:
        object.__setattr__(self, "gates", self.gates.without_dead_work())

    @classmethod
    def dense(cls, model: Model) -> Trimmed:
        """The unpruned model in both roles; everything travels."""
        return cls.whole(Pair.dense(model), Gates.dense(model.num_layers))

    @classmethod
    def whole(cls, pair: Pair, gates: Gates) -> Trimmed:
        """A pair under gates; everything travels."""
        return cls(pair=pair, gates=gates, policy=HandoverPolicy.full(gates.num_layers))

    @classmethod
    def of(cls, plan: PrunePlan, pair: Pair) -> Trimmed:
        """A plan, over the models that its stages run."""
        return cls(pair=pair, gates=plan.gates, policy=HandoverPolicy.of(plan))

    def streams(
        self,
        batch: Batch,
        *,
        resume: Trace | None = None,
        start: int = 0,
        stop: int | None = None,
        layout: CacheLayout = "compact",
    ) -> Trace:
        """Run the blocks from ``start`` on, from the streams that an earlier run recorded there.

        A candidate that differs from the recorded one in no layer before ``start`` costs only the
        layers from there. The result holds every layer's entry, ready to be resumed in turn.
        It ends with the entry of layer ``stop``.
        """
        run = _Run(self.pair, batch, self.gates, layout)
        trace = [run.entry()] if resume is None else resume[: start + 1]
        assert resume is not None or start == 0
        x, y = trace[-1]
        for layer in range(start, self.gates.num_layers if stop is None else stop):
            x, view = run.prefill(layer, x)
            y = run.decode(layer, y, view, self.policy)
            trace.append((x, y))
        return trace

    def prefill_stream(self, batch: Batch, x_BNE: Tensor, *, start: int, stop: int) -> Tensor:
        """Prefill's stream that enters layer ``stop``, from the one that enters ``start``.

        Nothing is handed over, and decode does not run.
        """
        run = _Run(self.pair, batch, self.gates, "compact")
        for layer in range(start, stop):
            x_BNE, _ = run.prefill(layer, x_BNE)
        return x_BNE

    def last_stream(self, batch: Batch) -> Tensor:
        """What decode's head reads, ``[B, C, E]``."""
        return self.streams(batch)[-1][1]


def last_streams(variants: Sequence[Trimmed], batch: Batch) -> list[Tensor]:
    """What decode's head reads in each variant, ``[B, C, E]``; what they do alike is done once.

    The variants go side by side through the layers. In each, those whose streams, blocks, gates and
    rules have been the same so far are one.
    """
    runs = [_Run(one.pair, batch, one.gates, "compact") for one in variants]
    made: dict[Hashable, Any] = {}

    def once(key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in made:
            made[key] = make()
        return made[key]

    at: list[tuple[Tensor, Tensor]] = [once(run.embeds(), run.entry) for run in runs]
    for layer in range(variants[0].gates.num_layers):
        made.clear()
        before, at = at, []  # those before live on meanwhile, so that no id comes twice
        for one, run, (x, y) in zip(variants, runs, before, strict=True):
            ahead, view = once((id(x), *run.does("prefill", layer)), partial(run.prefill, layer, x))
            key = (id(y), id(view), *run.does("decode", layer), *one.policy.of_layer(layer))
            at.append((ahead, once(key, partial(run.decode, layer, y, view, one.policy))))
    return [y for _, y in at]


class _Run:
    """A batch on its way through a pair, layer by layer."""

    def __init__(self, pair: Pair, batch: Batch, gates: Gates, layout: CacheLayout) -> None:
        self.pair, self.batch, self.gates, self.layout = pair, batch, gates, layout
        N, C = batch.prompt_BP.shape[1] - 1, batch.continuation_BC.shape[1]
        at = torch.arange(N + C, device=batch.prompt_BP.device)[None]
        self.prefill_rope = pair.prefill.rope(at[:, :N])
        self.decode_rope = pair.decode.rope(at[:, N:])
        self.positions_BC = at[:, N:].expand(len(batch), -1)

    def embeds(self) -> tuple[int, ...]:
        """What the streams that enter layer 0 depend on beside the batch."""
        models = self.pair.prefill, self.pair.decode
        return tuple(id(model.network.model.embed_tokens.weight) for model in models)

    def does(self, stage: Stage, layer: int) -> tuple[Hashable, ...]:
        """What a stage's step through a layer depends on beside its streams and its policy."""
        block = self.pair.of(stage).blocks[layer]
        attention, mlp = self.gates.of(stage)
        return stage, None if block is None else id(block.module), attention[layer], mlp[layer]

    def entry(self) -> tuple[Tensor, Tensor]:
        """The streams that enter layer 0."""
        return (
            self.pair.prefill.embed(self.batch.prefill_ids_BN),
            self.pair.decode.embed(self.batch.decode_ids_BC),
        )

    def prefill(self, layer: int, x_BNE: Tensor) -> tuple[Tensor, BlockView | None]:
        """One layer of the prompt."""
        return prefill_block(
            self.pair.prefill.blocks[layer],
            x_BNE,
            self.prefill_rope,
            self.pair.prefill.rope,
            attention=self.gates.prefill_attention[layer],
            mlp=self.gates.prefill_mlp[layer],
        )

    def decode(
        self, layer: int, y_BCE: Tensor, view: BlockView | None, policy: HandoverPolicy
    ) -> Tensor:
        """One layer of the continuation, on what the policy hands over."""
        cache = None
        if self.gates.decode_attention[layer]:
            assert view is not None
            groups = hand_over(policy, layer, view)
            N, C = view.k_BGND.shape[2], y_BCE.shape[1]
            if self.layout == "masked":
                groups = [one for group in groups for one in masked(group, N)]
            window = self.pair.decode.block(layer).window
            cache = LayerCache(groups, capacity=C, window=window)
        return decode_block(
            self.pair.decode.blocks[layer],
            y_BCE,
            self.decode_rope,
            self.positions_BC,
            cache,
            attention=self.gates.decode_attention[layer],
            mlp=self.gates.decode_mlp[layer],
        )


def forward(
    pair: Pair,
    batch: Batch,
    gates: Gates,
    policy: HandoverPolicy | None = None,
    *,
    layout: CacheLayout = "compact",
) -> Tensor:
    """Logits ``[B, C, V]`` of each continuation token, under the gates and the KV policy."""
    policy = policy or HandoverPolicy.full(gates.num_layers)
    trimmed = Trimmed(pair=pair, gates=gates, policy=policy)
    return pair.decode.head(trimmed.streams(batch, layout=layout)[-1][1])


def decode_stream(
    model: Model,
    batch: Batch,
    handed: Sequence[list[HeadGroup]],
    y_BCE: Tensor,
    *,
    start: int = 0,
    stop: int | None = None,
) -> Tensor:
    """Decode's stream behind layer ``stop - 1``, all layers running on known handovers.

    For comparing KV policies: the prompt's streams do not depend on them, so a policy that differs
    from layer ``start`` on costs only decode's layers from there.

    Args:
        handed: groups of each layer.
        y_BCE: the stream that enters layer ``start``.
    """
    N, C = batch.prompt_BP.shape[1] - 1, batch.continuation_BC.shape[1]
    at_BC = torch.arange(N, N + C, device=y_BCE.device).expand(len(batch), -1)
    rope = model.rope(at_BC[:1])
    for layer in range(start, model.num_layers if stop is None else stop):
        block = model.block(layer)
        cache = LayerCache(handed[layer], capacity=C, window=block.window)
        y_BCE = decode_block(block, y_BCE, rope, at_BC, cache, attention=True, mlp=True)
    return y_BCE
