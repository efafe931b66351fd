"""The literature's methods with small settings, and naive loops to hold them against."""

import copy

import pytest
import torch
from torch import nn

from helpers import reference_logits
from pdtrim.calibration.batches import Calibration
from pdtrim.calibration.self_text import write_own_text
from pdtrim.methods import Target
from pdtrim.methods.baselines import (
    SLEB,
    UIDL,
    BlockPruner,
    EvoPress,
    ShortenedPPL,
    ShortenedTaylor,
    ShortGPT,
)
from pdtrim.plan import Gates
from pdtrim.stage.forward import Batch

L, P, C, ROWS = 6, 10, 6, 9
N = P - 1
ALL = {
    "shortgpt": ShortGPT(),
    "sleb": SLEB(),
    "shortened-ppl": ShortenedPPL(),
    "shortened-taylor": ShortenedTaylor(protect_first=1, protect_last=1),
    "uidl": UIDL(),
    "blockpruner": BlockPruner(),
    "evopress": EvoPress(starts=8, offspring=6, generations=6),
}
each = pytest.mark.parametrize("method", ALL.values(), ids=ALL)


def text_of(model, rows=ROWS):
    """Text that the model itself wrote, so that every removal harms."""
    ids = write_own_text(model, sequences=rows, tokens=P + C, seed=1)
    batch = Batch(prompt_BP=ids[:, :P], continuation_BC=ids[:, P:])
    return Calibration(search=batch, rerank=batch[:0], fit=batch[:0], source="x", hash="0" * 64)


def flatten(model, layer, scale=1e-3):
    """Make a block nearly the identity."""
    with torch.no_grad():
        block = model.network.model.layers[layer]
        block.self_attn.o_proj.weight.mul_(scale)
        block.mlp.down_proj.weight.mul_(scale)
    return model


def ids_of(batch):
    return torch.cat((batch.prompt_BP, batch.continuation_BC), dim=1)


@torch.no_grad()
def hooked_streams(model, ids):
    """Input of each decoder layer and the output of the last, from a forward of transformers."""
    seen = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for layer in model.network.model.layers
    ]
    hooks.append(
        model.network.model.norm.register_forward_pre_hook(
            lambda module, args: seen.append(args[0])
        )
    )
    model.network(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    assert len(seen) == L + 1
    return seen


@torch.no_grad()
def nll_without(model, batch, gone):
    """Mean NLL of the continuations by a network that lacks the layers."""
    network = copy.deepcopy(model.network)
    kept = [layer for i, layer in enumerate(network.model.layers) if i not in gone]
    network.model.layers = nn.ModuleList(kept)
    network.config.num_hidden_layers = len(kept)
    logits = network(input_ids=ids_of(batch), use_cache=False).logits[:, N:-1]
    logp = logits.log_softmax(-1).gather(-1, batch.continuation_BC[..., None])
    return -float(logp.mean())


@torch.no_grad()
def nll_under(model, batch, gates):
    logp = reference_logits(model, batch, gates).log_softmax(-1)
    return -float(logp.gather(-1, batch.continuation_BC[..., None]).mean())


def naive_order(score, units, count):
    """Units removed one by one, each time the one without which the score is least."""
    gone = []
    for _ in range(count):
        left = [unit for unit in units if unit not in gone]
        gone.append(min(left, key=lambda unit: score({*gone, unit})))
    return gone


def pruned(prefill, decode, mode="unified"):
    return Gates.removing(L, prefill=prefill, decode=decode, mode=mode).without_dead_work()


def plan_of(method, model, calibration, prefill, decode, mode="unified", **more):
    target = Target(prefill_remove=prefill, decode_remove=decode, mode=mode, **more)
    return method.plan(model, calibration, target).plan
