"""Prompts of unequal lengths side by side: what each hands over, and decode's rows on it.

A prompt may have several rows of decode, one for each continuation: it is prefilled once. Every
layer is decoded when its prefill has ended, so that one layer's cache is in memory at a time.

Shapes: U prompts, N prefilled tokens of the longest, R rows of decode, C tokens of the longest row,
G KV heads, E hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pdtrim.kv.codecs import Raw
from pdtrim.kv.frame import SentLayer
from pdtrim.kv.groups import HeadGroup
from pdtrim.kv.join import join
from pdtrim.kv.policy import HandoverPolicy, hand_over, padding, select
from pdtrim.kv.selectors import Full
from pdtrim.stage.cache import LayerCache
from pdtrim.stage.forward import Trimmed
from pdtrim.stage.generate import prefill
from pdtrim.stage.step import decode_block
from pdtrim.stage.view import BlockView


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What prefill reads of some prompts, all but their last tokens, padded on the right.

    Attributes:
        lengths: tokens of each row without its padding; may be 0.
    """

    ids_UN: Tensor
    lengths: list[int]

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], device: torch.device) -> Prompts:
        """The prompts without their last tokens."""
        return cls(
            ids_UN=padded([prompt[:-1] for prompt in prompts], device),
            lengths=[len(prompt) - 1 for prompt in prompts],
        )


@dataclass(frozen=True, kw_only=True)
class DecodeRows:
    """What decode reads.

    Attributes:
        ids_RC: padded on the right; causality hides the padding.
        starts_R: position of each row's first token, which is its prompt's number of prefilled
            tokens.
        prompt_R: the prompt each row continues; None if row i continues prompt i.
    """

    ids_RC: Tensor
    starts_R: Tensor
    prompt_R: Tensor | None = None


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Token ids ``[rows, longest]``, padded on the right with 0."""
    longest = max(len(row) for row in rows)
    filled = [[*row, *[0] * (longest - len(row))] for row in rows]
    return torch.tensor(filled, dtype=torch.long, device=device).view(len(rows), longest)


def handed_over(trimmed: Trimmed, prompts: Prompts) -> Iterator[tuple[int, list[HeadGroup]]]:
    """What decode sees of each layer that it reads, U rows, as that layer's prefill ends."""
    lengths_U = torch.tensor(prompts.lengths, device=prompts.ids_UN.device)
    hidden_UN = padding(lengths_U, prompts.ids_UN.shape[1])
    for layer, view in prefill(trimmed.pair.prefill, prompts.ids_UN, trimmed.gates):
        rule = trimmed.policy.rules[layer]
        if isinstance(rule.selector, Full) and isinstance(rule.codec, Raw):
            groups = hand_over(trimmed.policy, layer, view)  # all tokens, whatever the row
            yield layer, [replace(group, padded_BM=hidden_UN) for group in groups]
        else:
            rows = (view.row(row, tokens) for row, tokens in enumerate(prompts.lengths))
            yield layer, join([_alone(trimmed.policy, layer, row) for row in rows])


def _alone(policy: HandoverPolicy, layer: int, view: BlockView) -> SentLayer:
    """The handover of one row: selectors and codecs must not see its padding."""
    kept = select(policy, layer, view)
    return SentLayer(keep_GN=kept.keep_BGN[0], groups=kept.coded())


def for_rows(group: HeadGroup, prompt_R: Tensor | None) -> HeadGroup:
    """A row of the group for each row of decode."""
    if prompt_R is None:
        return group
    return HeadGroup(
        heads=group.heads,
        k_BgMD=group.k_BgMD[prompt_R],
        v_BgMD=group.v_BgMD[prompt_R],
        positions_BgM=group.positions_BgM[prompt_R],
        padded_BM=None if group.padded_BM is None else group.padded_BM[prompt_R],
    )


@torch.inference_mode()
def decode_rows(trimmed: Trimmed, prompts: Prompts, rows: DecodeRows) -> Tensor:
    """Decode's last stream ``[R, C, E]`` over the rows' tokens, behind their prompts' handover."""
    model, gates = trimmed.pair.decode, trimmed.gates
    C = rows.ids_RC.shape[1]
    at_RC = rows.starts_R[:, None] + torch.arange(C, device=rows.ids_RC.device)
    rope = model.rope(at_RC)
    y_RCE = model.embed(rows.ids_RC)
    handed = handed_over(trimmed, prompts)
    for layer in range(gates.num_layers):
        cache = None
        if gates.decode_attention[layer]:
            read, groups = next(handed)
            assert read == layer
            cache = LayerCache(
                [for_rows(group, rows.prompt_R) for group in groups],
                capacity=C,
                window=model.block(layer).window,
            )
        y_RCE = decode_block(
            model.blocks[layer],
            y_RCE,
            rope,
            at_RC,
            cache,
            attention=gates.decode_attention[layer],
            mlp=gates.decode_mlp[layer],
        )
    return y_RCE
