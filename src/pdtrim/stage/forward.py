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

from dataclasses import dataclass

import torch
from torch import Tensor

from pdtrim.kv.policy import HandoverPolicy, hand_over
from pdtrim.models.model import Model
from pdtrim.plan import Gates
from pdtrim.stage.cache import LayerCache
from pdtrim.stage.step import decode_block, prefill_block


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

    def __getitem__(self, rows: slice) -> Batch:
        return Batch(prompt_BP=self.prompt_BP[rows], continuation_BC=self.continuation_BC[rows])

    def __len__(self) -> int:
        return self.prompt_BP.shape[0]

    @classmethod
    def join(cls, parts: list[Batch]) -> Batch:
        """Batches of equal lengths below one another."""
        return cls(
            prompt_BP=torch.cat([part.prompt_BP for part in parts]),
            continuation_BC=torch.cat([part.continuation_BC for part in parts]),
        )

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


Trace = list[tuple[Tensor, Tensor]]
"""Streams that enter each layer, and the last one's output: L + 1 pairs ``([B,N,E], [B,C,E])``.

Prefill's stream stands still behind the last layer whose KV decode reads.
"""


def streams(
    pair: Pair,
    batch: Batch,
    gates: Gates,
    policy: HandoverPolicy | None = None,
    *,
    resume: Trace | None = None,
    start: int = 0,
) -> Trace:
    """Run the blocks from ``start`` on, from the streams that an earlier run recorded there.

    A candidate that differs from the recorded one in no layer before ``start`` costs only the
    layers from there. The result holds every layer's entry, ready to be resumed in turn.
    """
    gates = gates.without_dead_work()
    policy = policy or HandoverPolicy.full(gates.num_layers)
    N, C = batch.prompt_BP.shape[1] - 1, batch.continuation_BC.shape[1]
    at = torch.arange(N + C, device=batch.prompt_BP.device)[None]
    prefill_rope = pair.prefill.rope(at[:, :N])
    decode_rope = pair.decode.rope(at[:, N:])
    if resume is None:
        assert start == 0
        entry = pair.prefill.embed(batch.prefill_ids_BN), pair.decode.embed(batch.decode_ids_BC)
        trace: Trace = [entry]
    else:
        trace = resume[: start + 1]
    x, y = trace[-1]
    for layer in range(start, gates.num_layers):
        x, kv = prefill_block(
            pair.prefill.blocks[layer],
            x,
            prefill_rope,
            attention=gates.prefill_attention[layer],
            mlp=gates.prefill_mlp[layer],
        )
        cache = None
        if gates.decode_attention[layer]:
            assert kv is not None
            k, v, positions = hand_over(policy, layer, *kv)
            cache = LayerCache(k_BGMD=k, v_BGMD=v, positions_BM=positions[None], capacity=C)
        y = decode_block(
            pair.decode.blocks[layer],
            y,
            decode_rope,
            at[:, N:].expand(len(batch), -1),
            cache,
            attention=gates.decode_attention[layer],
            mlp=gates.decode_mlp[layer],
        )
        trace.append((x, y))
    return trace


def forward(pair: Pair, batch: Batch, gates: Gates, policy: HandoverPolicy | None = None) -> Tensor:
    """Logits ``[B, C, V]`` of each continuation token, under the gates and the KV policy."""
    return pair.decode.head(streams(pair, batch, gates, policy)[-1][1])
