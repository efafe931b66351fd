"""Hold what pdtrim computes of a model against the network's own, before anyone plans on it.

A fact of an architecture that pdtrim does not know of (a window, a scale, a norm) shows here as a
difference, whatever the config calls it. Blocks are compared one by one on the streams that the
network itself has, in fp32, so that the rounding of 16-bit models, which can be large where keys
are, hides nothing and raises no false alarm.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pdtrim.errors import ModelError, NotFinite, border
from pdtrim.models.block import Block
from pdtrim.models.hooks import before_each
from pdtrim.models.model import Model
from pdtrim.stage.step import prefill_block

TOKENS = 24
LONGEST = 1024
"""Windows beyond this many tokens are not run past: it would take too long."""
MOST = 1e-3
"""Of a block's fp32 output, relative to its largest element."""


@torch.inference_mode()
def check_forward(model: Model) -> None:
    """Compare embedding, every block and head on a short random text, past a short window.

    Raises:
        ModelError: they differ: pdtrim does not know all of what the model computes.
        NotFinite: the network's own logits are not finite.
    """
    windows = [block.window for block in model.blocks if block and block.window is not None]
    near = [window for window in windows if window <= LONGEST]
    limit = int(getattr(model.config, "max_position_embeddings", None) or LONGEST)
    length = max(1, min(max([TOKENS, *(window + 8 for window in near)]), limit))
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, int(model.config.vocab_size), (1, length), generator=generator)
    ids_BT = ids_BT.to(model.device)
    with border(ModelError, f"'{model.name}' does not run"):
        with _calls(model) as calls:
            logits_BTV = model.network(ids_BT, use_cache=False).logits
        if not bool(logits_BTV.isfinite().all()):
            raise NotFinite(
                f"'{model.name}' computes logits that are not finite in {model.dtype}: its weights"
                " are damaged, or another --dtype is needed"
            )
        _compare(model, "embedding", model.embed(ids_BT), calls[0][0])
        for layer, (x_BTE, options) in enumerate(calls[: model.num_layers]):
            _compare(model, f"block {layer}", *_both(model.block(layer), x_BTE, options))
        _compare(model, "head", model.head(calls[-1][0]), logits_BTV)


Call = tuple[Tensor, dict[str, Any]]
"""The stream that enters a block, and what else the network gives it."""


@contextmanager
def _calls(model: Model) -> Iterator[list[Call]]:
    """What each block is called with while the network runs, and last the stream behind them."""
    calls: list[Call] = []
    parts = [*(block.module for block in model.blocks if block), model.network.model.norm]
    with before_each(parts, lambda number, x, options: calls.append((x, options))):
        yield calls


def _both(block: Block, x_BTE: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """A block's output by pdtrim and by transformers, both in fp32."""
    module = copy.deepcopy(block.module).float()
    x_BTE = x_BTE.float()
    rope = tuple(part.float() for part in options["position_embeddings"])
    mask = options.get("attention_mask")
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    changed = {"position_embeddings": rope, "attention_mask": mask, "hidden_states": x_BTE}
    theirs = module(**{**options, **changed})
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    own = type(block)(module, window=block.window)
    ours, _ = prefill_block(own, x_BTE, (rope[0], rope[1]), _no_rope, attention="full", mlp=True)
    return ours, theirs


def _no_rope(positions: Tensor) -> Any:
    raise AssertionError("no selector asks for positions here")


def _compare(model: Model, what: str, ours: Tensor, theirs: Tensor) -> None:
    ours, theirs = ours.float(), theirs.float()
    off = float((ours - theirs).abs().max()) / max(float(theirs.abs().max()), 1e-30)
    if not off <= MOST:
        raise ModelError(
            f"'{model.name}' computes something that pdtrim does not know of: its {what} differs"
            f" from pdtrim's by {off:.2g} of its largest number; the architecture is not supported"
            " as it is"
        )
