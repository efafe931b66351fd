"""The simulator against transformers, on every family, gate state and KV policy."""

import itertools
import random

import pytest
import torch

from helpers import (
    FAMILIES,
    first_last,
    random_batch,
    random_gates,
    reference_logits,
    tiny_model,
    trimmed,
)
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.plan import Gates, LayerKV
from pdtrim.search.objective import first_difference
from pdtrim.stage import attention
from pdtrim.stage.forward import Pair, forward


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_gates_equal_transformers(family):
    model = tiny_model(family)
    batch = random_batch(model, prompt=12)
    ids = torch.cat((batch.prompt_BP, batch.continuation_BC), dim=1)[:, :-1]
    with torch.no_grad():
        theirs = model.network(ids).logits[:, -batch.continuation_BC.shape[1] :]
        ours = forward(Pair.dense(model), batch, Gates.dense(4))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_gates_equal_one_masked_forward(family):
    model, rng = tiny_model(family), random.Random(1)
    batch = random_batch(model, prompt=11)
    dense = forward(Pair.dense(model), batch, Gates.dense(4))
    for _ in range(25):
        gates = random_gates(4, rng)
        kept = {i: set(range(2)) | set(range(6, 10)) for i in range(4) if rng.random() < 0.5}
        rules = tuple(first_last(2, 4) if i in kept else LayerKV() for i in range(4))
        with torch.no_grad():
            ours = forward(Pair.dense(model), batch, gates, HandoverPolicy(rules=rules))
        theirs = reference_logits(model, batch, gates, kept)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours, dense, atol=1e-2), "the gates must matter for this to prove"


def test_every_whole_block_state_of_three_blocks():
    model = tiny_model("llama", layers=3)
    batch = random_batch(model)
    subsets = [set(c) for r in range(4) for c in itertools.combinations(range(3), r)]
    for prefill, decode in itertools.product(subsets, subsets):
        gates = Gates.removing(3, prefill=prefill, decode=decode)
        with torch.no_grad():
            ours = forward(Pair.dense(model), batch, gates)
        theirs = reference_logits(model, batch, gates)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_dead_prefill_work_is_exactly_dead():
    model, rng = tiny_model("qwen3"), random.Random(2)
    batch = random_batch(model)
    for _ in range(20):
        gates = random_gates(4, rng)
        trimmed = gates.without_dead_work()
        theirs = reference_logits(model, batch, gates)
        torch.testing.assert_close(
            reference_logits(model, batch, trimmed), theirs, atol=1e-6, rtol=1e-6
        )
        assert all(a == "off" for a in trimmed.prefill_attention[trimmed.last_read + 1 :])


def random_gates_after(old, layer, rng):
    """Random gates that equal ``old`` before a layer."""
    new = random_gates(old.num_layers, rng)
    fields = {name: (*getattr(old, name)[:layer], *value[layer:]) for name, value in new}
    return Gates(**fields)


def test_resuming_a_trace_equals_running_from_the_start():
    model, rng = tiny_model("llama", layers=6), random.Random(3)
    batch, pair = random_batch(model), Pair.dense(model)
    old = random_gates(6, rng)
    trace = trimmed(pair, old).streams(batch)
    resumed_late = 0
    for _ in range(40):
        new = random_gates_after(old, rng.randrange(6), rng)
        start = first_difference(old, new)
        resumed_late += start > 0
        again = trimmed(pair, new).streams(batch, resume=trace, start=start)
        fresh = trimmed(pair, new).streams(batch)
        torch.testing.assert_close(again[-1][1], fresh[-1][1], atol=0, rtol=0)
        old, trace = new, again
    assert resumed_late > 5


def test_one_token_prompt_needs_no_prefill():
    model = tiny_model("llama")
    batch = random_batch(model, prompt=1)
    gates = Gates.removing(4, prefill={1, 2})
    ours = forward(Pair.dense(model), batch, gates)
    torch.testing.assert_close(ours, forward(Pair.dense(model), batch, Gates.dense(4)))


@pytest.mark.parametrize("queries,keys", [(1, 9), (7, 7), (40, 65), (5, 64)])
@pytest.mark.parametrize("masked", [False, True])
def test_tiled_attention_equals_the_fused_kernel(monkeypatch, queries, keys, masked):
    monkeypatch.setattr(attention, "TILE_SCORES", 4000)  # several tiles
    torch.manual_seed(0)
    q = torch.randn(2, 6, queries, 16)
    k, v = torch.randn(2, 2, keys, 16), torch.randn(2, 2, keys, 16)
    allowed = None
    if masked:
        allowed = torch.rand(2, queries, keys) < 0.6
        allowed[:, :, 0] = True
    fused = attention.attend(q, k, v, scale=0.25, allowed_BTS=allowed)
    tiled = attention._tiled(q * 0.25, k, v, allowed)
    torch.testing.assert_close(tiled, fused, atol=1e-5, rtol=1e-5)
    half = [t.bfloat16() for t in (q, k, v)]
    with torch.no_grad():
        chosen = attention.attend(*half, scale=0.25, allowed_BTS=allowed)
    torch.testing.assert_close(chosen.float(), fused, atol=0.05, rtol=0.05)
