"""Repairs of constructed models, in which what is repaired is exactly known."""

import pytest
import torch
import torch.nn.functional as F

from helpers import normal, random_batch, tiny_model, trimmed
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.models.narrow import narrow_blocks
from pdtrim.plan import Gates, Width
from pdtrim.repair.apply import first_change, repair
from pdtrim.search.objective import dense_trace
from pdtrim.stage.forward import Pair, forward
from pdtrim.stage.swap import swap_pair

WIDTH, INNER, HALF = 32, 48, 16
FULL = HandoverPolicy.full(4)


def model_with_a_linear_block(effect_EE):
    """Layer 2 only adds ``stream @ effect``: its gate is constant, its norm's epsilon huge."""
    model = tiny_model("llama", mlp_bias=True, rms_norm_eps=1e-12)
    block = model.block(2).module
    with torch.no_grad():
        block.self_attn.o_proj.weight.zero_()
        block.post_attention_layernorm.variance_epsilon = 1e12
        block.post_attention_layernorm.weight.fill_(1e6)
        for linear_part in (block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj):
            linear_part.weight.zero_()
            linear_part.bias.zero_()
        block.mlp.gate_proj.bias.fill_(2.0)
        block.mlp.up_proj.weight[:WIDTH] = torch.eye(WIDTH)
        block.mlp.down_proj.weight[:, :WIDTH] = effect_EE.T / F.silu(torch.tensor(2.0))
    return model


def mlp_channels_only(model):
    """Before layer 2 nothing but the MLP of layer 1 writes to the upper half of the channels."""
    with torch.no_grad():
        model.network.model.embed_tokens.weight[:, HALF:] = 0
        first, second = model.block(0).module, model.block(1).module
        for part in (first.self_attn.o_proj, first.mlp.down_proj, second.self_attn.o_proj):
            part.weight[HALF:] = 0
        first.mlp.down_proj.bias[HALF:] = 0
    return model


def effect(kind):
    if kind == "scalar":
        return 0.7 * torch.eye(WIDTH)
    mixed = torch.zeros(WIDTH, WIDTH)
    upper = normal(HALF, WIDTH) if kind == "linear" else torch.diag(normal(HALF))
    mixed[HALF:, WIDTH - upper.shape[1] :] = upper
    return mixed


CUT = Gates.removing(4, prefill={2}, decode={2})


@pytest.mark.parametrize("kind", ["scalar", "diagonal", "linear"])
def test_a_repair_is_exact_where_its_form_fits(kind):
    model = model_with_a_linear_block(effect(kind))
    if kind != "scalar":
        mlp_channels_only(model)
    fit = random_batch(model, rows=12, prompt=12, new=10, seed=1)
    blocks = repair(model, trimmed(model, CUT, FULL), fit, kind, ridge=1e-9)
    layer = 3 if kind == "scalar" else 1
    # prefill's layer 3 only makes K and V: a scalar behind the cut has nothing to divide there
    assert set(blocks["decode"]) == {layer}
    assert set(blocks["prefill"]) == (set() if kind == "scalar" else {layer})
    pair, batch = swap_pair(Pair.dense(model), blocks), random_batch(model, rows=3, seed=5)
    with torch.no_grad():
        wanted = forward(Pair.dense(model), batch, Gates.dense(4))
        bare = forward(Pair.dense(model), batch, CUT)
        repaired = forward(pair, batch, CUT)
    assert (bare - wanted).abs().max() > 0.05
    torch.testing.assert_close(repaired, wanted, atol=2e-4, rtol=1e-3)


def test_scalar_keeps_the_mean_norm_behind_every_cut():
    model, gates = tiny_model("llama", layers=8), Gates.removing(8, prefill={1, 4}, decode={1, 4})
    policy, batch = HandoverPolicy.full(8), random_batch(tiny_model("llama"), rows=10)
    blocks = repair(model, trimmed(model, gates, policy), batch, "scalar")
    assert {stage: sorted(blocks[stage]) for stage in blocks} == {
        "prefill": [2, 3, 5, 6],
        "decode": [2, 3, 5, 6, 7],
    }
    with torch.no_grad():
        dense = dense_trace(model, batch)
        trace = trimmed(swap_pair(Pair.dense(model), blocks), gates, policy).streams(batch)
    for side, stage in enumerate(("prefill", "decode")):
        for stop in (2, 5):  # the stream behind a cut is the dense one's over the gain
            new = blocks[stage][stop]["mlp.down_proj.weight"]
            before = model.block(stop).module.mlp.down_proj.weight.detach()
            gain = float((before / new).mean())
            ratio = dense[stop][side].norm(dim=-1).mean() / trace[stop][side].norm(dim=-1).mean()
            assert gain == pytest.approx(float(ratio), rel=1e-4) and abs(gain - 1) > 0.01
            assert set(blocks[stage][stop]) == {"mlp.down_proj.weight", "self_attn.o_proj.weight"}


def doubled():
    """A model in which half of the neurons and of the KV groups of layers 1 and 2 are copies."""
    model = tiny_model("llama", layers=4, num_key_value_heads=4, num_attention_heads=4)
    with torch.no_grad():
        for layer in (1, 2):
            attention, mlp = model.block(layer).module.self_attn, model.block(layer).module.mlp
            for part in (
                attention.q_proj,
                attention.k_proj,
                attention.v_proj,
                mlp.gate_proj,
                mlp.up_proj,
            ):
                half = part.weight.shape[0] // 2
                part.weight[half:] = part.weight[:half]
    kept = Width.of(groups=(0, 1), neurons=range(INNER // 2), num_neurons=INNER)
    return model, narrow_blocks(model, {1: kept, 2: kept})


@pytest.mark.parametrize("kind", ["outputs", "shared"])
def test_what_stays_takes_over_what_went_where_it_can(kind):
    model, narrow = doubled()
    fit = random_batch(model, rows=16, prompt=12, new=10, seed=1)
    gates, start = Gates.dense(4), Pair.dense(narrow)
    assert first_change(model, trimmed(start, gates), "decode") == 1
    assert first_change(model, trimmed(Pair.dense(model), gates), "decode") is None
    blocks = repair(model, trimmed(start, gates, FULL), fit, kind, outputs_ridge=1e-7)
    # nothing is to be done before the first change, and prefill ends with the K and V of layer 3
    assert (set(blocks["prefill"]), set(blocks["decode"])) == ({1, 2}, {1, 2, 3})
    if kind == "shared":
        for layer in (1, 2):
            for name, part in blocks["prefill"][layer].items():
                assert torch.equal(part, blocks["decode"][layer][name])
    batch = random_batch(model, rows=3, seed=5)
    with torch.no_grad():
        wanted = forward(Pair.dense(model), batch, gates)
        bare, repaired = (forward(swap_pair(start, b), batch, gates) for b in ({}, blocks))
    assert (bare - wanted).abs().max() > 0.05
    torch.testing.assert_close(repaired, wanted, atol=5e-3, rtol=1e-2)
