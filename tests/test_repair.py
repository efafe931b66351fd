"""Repairs: exact where they can be, each stage toward its own dense streams, and never a loss."""

import math

import pytest
import torch
import torch.nn.functional as F

from helpers import first_last, random_batch, tiny_model
from pdtrim.calibration.teacher import Teacher
from pdtrim.errors import PdtrimError
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.models.narrow import narrow_blocks
from pdtrim.plan import Gates, LayerKV, Width
from pdtrim.repair import diagonal, kv, linear, outputs, scalar
from pdtrim.repair.apply import KINDS, RIDGE, SHARED, best_repair, first_change, repair
from pdtrim.repair.cuts import find_cuts, merged_layers, readers
from pdtrim.search.objective import dense_trace
from pdtrim.stage.forward import Pair, forward, streams
from pdtrim.stage.replaced import swap_pair

WIDTH, INNER, HALF = 32, 48, 16
FULL = HandoverPolicy.full(4)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# the formulas


def test_linear_finds_the_matrix_and_its_ridge_pulls_to_none():
    m, w = random(200, 8), random(8, 8, seed=1)
    halves = [(m[:90], m[:90] @ w), (m[90:], m[90:] @ w)]
    torch.testing.assert_close(linear.fit(halves, ridge=1e-12).float(), w)
    assert torch.equal(linear.fit(halves, ridge=math.inf), torch.eye(8, dtype=torch.float64))
    # the minimum of |m W - d|^2 + ridge c |W - 1|^2, by stacking the ridge below the data
    d, c = random(200, 8, seed=2), float(m.double().square().sum(0).mean())
    root = math.sqrt(0.5 * c)
    stacked = torch.linalg.lstsq(
        torch.cat((m, root * torch.eye(8))).double(), torch.cat((d, root * torch.eye(8))).double()
    )
    torch.testing.assert_close(linear.fit([(m, d)], ridge=0.5), stacked.solution)
    zero = torch.zeros(5, 8)
    assert torch.equal(linear.fit([(zero, zero)], ridge=0.1), torch.eye(8, dtype=torch.float64))


def test_diagonal_is_the_linear_fit_of_each_channel():
    m, d = random(100, 3), random(100, 3, seed=1)
    m[:, 1] = 0
    c = float(m.double().square().sum(0).mean())
    found = diagonal.fit([(m[:30], d[:30]), (m[30:], d[30:])], ridge=0.5)
    for i in range(3):
        alone = (m[:, i] @ d[:, i] + 0.5 * c) / (m[:, i] @ m[:, i] + 0.5 * c)
        assert float(found[i, i]) == pytest.approx(float(alone), rel=1e-5)
    assert torch.equal(found, torch.diag(found.diagonal()))
    infinite = diagonal.fit([(m, d)], ridge=math.inf)
    assert torch.equal(infinite, torch.eye(3, dtype=torch.float64))
    assert float(diagonal.fit([(m, d)], ridge=1e-300)[1, 1]) == 1  # a channel never written


def test_scalar_is_the_ratio_of_mean_norms():
    s, t = random(40, 5), random(40, 5, seed=1)
    wanted = float(t.norm(dim=1).mean() / s.norm(dim=1).mean())
    assert scalar.fit([(s[:7], t[:7]), (s[7:], t[7:])]) == pytest.approx(wanted, rel=1e-5)
    assert scalar.fit([(torch.zeros(2, 5), t)]) == 1.0


def test_kv_finds_the_projections_and_its_ridge_pulls_to_the_old_ones():
    h, mix = random(200, 8), random(8, 8, seed=1)
    old = {"k": random(3, 8, seed=2), "v": random(5, 8, seed=3)}
    found = kv.fit([(h[:60], h[:60] @ mix), (h[60:], h[60:] @ mix)], old, ridge=1e-12)
    for name, w_FE in old.items():
        torch.testing.assert_close(h @ found[name].T, h @ mix @ w_FE.T, atol=1e-4, rtol=1e-4)
    same = kv.fit([(h, h @ mix)], old, ridge=math.inf)
    assert all(torch.equal(same[name], old[name]) for name in old)
    # the minimum of |h W'^T - g W^T|^2 + ridge c |W' - W|^2, by stacking the ridge below the data
    g, root = random(200, 8, seed=4).double(), math.sqrt(0.5 * float(h.square().sum(0).mean()))
    w = old["k"].double()
    stacked = torch.linalg.lstsq(
        torch.cat((h.double(), root * torch.eye(8))), torch.cat((g @ w.T, root * w.T))
    )
    found = kv.fit([(h, g.float())], old, ridge=0.5)
    torch.testing.assert_close(found["k"], stacked.solution.T.float(), atol=1e-4, rtol=1e-4)
    zero = torch.zeros(5, 8)
    assert torch.equal(kv.fit([(zero, zero)], old, ridge=0.1)["v"], old["v"])


def test_outputs_finds_the_projection_its_bias_and_pulls_to_the_old_one():
    x, old, new = random(200, 8) + 1, random(5, 8, seed=1), random(5, 8, seed=2)
    halves = [(x[:90], x[:90] @ new.T + 3), (x[90:], x[90:] @ new.T + 3)]
    found, bias = outputs.fit(halves, old, torch.zeros(5), ridge=1e-12)
    torch.testing.assert_close(found, new, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(bias, torch.full((5,), 3.0), atol=1e-3, rtol=1e-3)
    same, bias = outputs.fit(halves, old, torch.zeros(5), ridge=math.inf)
    assert torch.equal(same, old)  # the bias is not pulled: it makes up for the mean
    wanted = (x @ new.T + 3 - x @ old.T).mean(0)
    torch.testing.assert_close(bias, wanted, atol=1e-4, rtol=1e-4)
    # the minimum of |x W'^T - d|^2 + ridge c |W' - W|^2, by stacking the ridge below the data
    d, root = random(200, 5, seed=3), math.sqrt(0.5 * float(x.square().sum(0).mean()))
    stacked = torch.linalg.lstsq(
        torch.cat((x, root * torch.eye(8))).double(), torch.cat((d, root * old.T)).double()
    )
    found, none = outputs.fit([(x, d)], old, ridge=0.5)
    assert none is None
    torch.testing.assert_close(found, stacked.solution.T.float(), atol=1e-4, rtol=1e-4)
    assert torch.equal(outputs.fit([(x * 0, d)], old, ridge=0.1)[0], old)


# the cuts


def test_cuts_are_runs_of_whole_blocks_with_their_readers():
    gates = Gates.removing(9, prefill={0, 2, 3, 4, 7, 8}, decode={0, 3, 6, 7})
    decode = [(c.first, c.stop, c.readers) for c in find_cuts(gates, "decode")]
    assert decode == [(0, 1, (1,)), (3, 4, (4,)), (6, 8, (8,))]
    # layers 2 and 4 still make K and V from the stream of the cut, 3 does not; 8 is a reader too
    prefill = [(c.first, c.stop, c.readers) for c in find_cuts(gates, "prefill")]
    assert prefill == [(0, 1, (1,)), (2, 5, (2, 4, 5)), (7, 9, (8,))]
    assert merged_layers(gates) == {
        ("prefill", 1): (1, 2, 3, 4),
        ("prefill", 6): (6, 7, 8),
        ("decode", 2): (2, 3),
        ("decode", 5): (5, 6, 7),
    }
    tail = Gates.removing(4, prefill={3}, decode={2, 3})
    assert find_cuts(tail, "prefill") == ()  # prefill ends with layer 1
    assert [c.readers for c in find_cuts(tail, "decode")] == [(4,)]  # the head
    assert find_cuts(Gates.removing(4, prefill={3}), "prefill") == ()  # 3 reads what it always did
    parts = Gates.dense(4).model_copy(update={"decode_mlp": (True, False, True, True)})
    assert find_cuts(parts, "decode") == ()


def test_readers_are_skipped_keys_and_values_and_the_next_that_writes():
    gates = Gates.removing(9, prefill={2, 3, 4, 7, 8}, decode={3, 6, 7}).without_dead_work()
    assert readers(gates, "prefill", 1) == (2, 4, 5)  # 3 makes no K and V: decode skips it
    assert readers(gates, "prefill", 5) == (6,) and readers(gates, "prefill", 6) == (8,)
    assert readers(gates, "prefill", 8) == ()
    assert readers(gates, "decode", 2) == (4,) and readers(gates, "decode", 8) == (9,)


# constructed models, in which a repair is exact


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
    upper = random(HALF, WIDTH) if kind == "linear" else torch.diag(random(HALF))
    mixed[HALF:, WIDTH - upper.shape[1] :] = upper
    return mixed


CUT = Gates.removing(4, prefill={2}, decode={2})


@pytest.mark.parametrize("kind", ["scalar", "diagonal", "linear"])
def test_a_repair_is_exact_where_its_form_fits(kind):
    model = model_with_a_linear_block(effect(kind))
    if kind != "scalar":
        mlp_channels_only(model)
    fit = random_batch(model, rows=12, prompt=12, new=10, seed=1)
    blocks = repair(model, CUT, FULL, fit, kind, ridge=1e-9)
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
    blocks = repair(model, gates, policy, batch, "scalar")
    assert {stage: sorted(blocks[stage]) for stage in blocks} == {
        "prefill": [2, 3, 5, 6],
        "decode": [2, 3, 5, 6, 7],
    }
    with torch.no_grad():
        dense = dense_trace(model, batch)
        trace = streams(swap_pair(Pair.dense(model), blocks), batch, gates, policy)
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
    assert first_change(model, start, gates, "decode") == 1
    assert first_change(model, Pair.dense(model), gates, "decode") is None
    blocks = repair(model, gates, FULL, fit, kind, pair=start, outputs_ridge=1e-7)
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


# text that no fit has seen


@pytest.fixture(scope="module")
def setting():
    model = tiny_model("qwen3", layers=6)
    gates = Gates.removing(6, prefill={2, 3, 5}, decode={3})
    policy = HandoverPolicy(rules=(first_last(1, 6),) * 6)
    fit = random_batch(model, rows=32, prompt=12, new=10, seed=1)
    return model, gates, policy, fit, random_batch(model, rows=10, prompt=12, new=10, seed=2)


def held_out_kl(setting, blocks, pair=None):
    model, gates, policy, _, held_out = setting
    pair = swap_pair(pair or Pair.dense(model), blocks)
    with torch.no_grad():
        y = streams(pair, held_out, gates, policy)[-1][1]
        return float(Teacher.of(model, held_out).kl(pair.decode, y).mean())


def test_linear_lowers_kl_and_an_infinite_ridge_does_nothing(setting):
    model, gates, policy, fit, _ = setting
    none = held_out_kl(setting, {})
    blocks = repair(model, gates, policy, fit, "linear")
    assert (set(blocks["prefill"]), set(blocks["decode"])) == ({1}, {2})
    assert held_out_kl(setting, blocks) < 0.97 * none
    with torch.no_grad():
        dense = dense_trace(model, fit)[4]
        bare, repaired = (
            streams(swap_pair(Pair.dense(model), b), fit, gates, policy)[4] for b in ({}, blocks)
        )
    for side in (0, 1):  # the streams behind the cut, prefill's and decode's
        assert (repaired[side] - dense[side]).norm() < 0.95 * (bare[side] - dense[side]).norm()
    for kind in ("linear", "diagonal"):
        same = repair(model, gates, policy, fit, kind, ridge=math.inf)
        for stage, layer in (("prefill", 1), ("decode", 2)):
            torch.testing.assert_close(
                same[stage][layer]["mlp.down_proj.weight"],
                model.block(layer).module.mlp.down_proj.weight.detach(),
            )


def test_a_later_cut_is_fitted_with_the_earlier_repairs_in_place():
    model, gates = tiny_model("llama", layers=6), Gates.removing(6, prefill={2, 4}, decode={2, 4})
    policy = HandoverPolicy.full(6)
    fit = random_batch(model, rows=12, prompt=12, new=10, seed=1)
    whole = repair(model, gates, policy, fit, "linear")
    first = {stage: {1: whole[stage][1]} for stage in whole}
    pair = swap_pair(Pair.dense(model), first)
    with torch.no_grad():
        dense = dense_trace(model, fit)
        off = gates.model_copy(update={"decode_mlp": (True, True, False, False, False, True)})
        y = streams(pair, fit, off, policy)[4][1].flatten(0, 1)  # layer 3 without its MLP
        m = model.block(3).mlp(y)
    w = linear.fit([(m, dense[5][1].flatten(0, 1) - y)], ridge=RIDGE)
    wanted = linear.fold({"mlp.down_proj.weight": model.block(3).module.mlp.down_proj.weight}, w)
    torch.testing.assert_close(
        whole["decode"][3]["mlp.down_proj.weight"],
        wanted["mlp.down_proj.weight"].detach(),
        atol=1e-4,
        rtol=1e-4,
    )


def test_a_pair_with_other_weights_is_repaired_as_it_is(setting):
    model, gates, policy, fit, _ = setting
    name = "mlp.down_proj.weight"
    spoilt = swap_pair(
        Pair.dense(model), {"decode": {2: {name: 3 * model.block(2).module.mlp.down_proj.weight}}}
    )
    blocks = repair(model, gates, policy, fit, "linear", pair=spoilt)
    assert held_out_kl(setting, blocks, spoilt) < 0.9 * held_out_kl(setting, {}, spoilt)


def test_the_best_repair_is_chosen_on_held_out_text(setting):
    model, gates, policy, fit, held_out = setting
    best = best_repair(model, gates, policy, fit, held_out)
    assert best.tried["prefill"]["none"] == pytest.approx(held_out_kl(setting, {}), rel=1e-5)
    assert best.kl == pytest.approx(held_out_kl(setting, best.blocks), rel=1e-5)
    for stage, tried in best.tried.items():
        both = SHARED if stage == "decode" else ()
        assert list(tried) == [*KINDS[stage], *both]
        if not set(best.kinds.values()) <= set(SHARED):
            assert tried[best.kinds[stage]] == min(tried.values())
    # decode's repair is tried on prefill's
    assert best.tried["decode"]["none"] == min(best.tried["prefill"].values())
    assert best.kl == min(best.tried["decode"].values()) and best.text != "none"
    alone = repair(model, gates, policy, fit, "linear", stages=("decode",))
    assert alone["prefill"] == {} and alone["decode"]


def test_outputs_repairs_a_lone_attention_and_more_than_the_block_before_a_cut(setting):
    model, gates, policy, fit, _ = setting
    lone = Gates.dense(6).model_copy(
        update={"decode_attention": (True, True, False, True, True, True)}
    )
    for off, stages in ((lone, ("decode",)), (gates, ("prefill", "decode"))):
        own = (model, off, HandoverPolicy.full(6), *setting[3:])
        blocks = repair(model, off, own[2], fit, "outputs", stages=stages)
        old = repair(model, off, own[2], fit, "linear", stages=stages)
        assert held_out_kl(own, blocks) < 0.98 * held_out_kl(own, old)
    assert set(repair(model, lone, policy, fit, "outputs")["decode"]) == {2, 3, 4, 5}
    assert set(repair(model, gates, policy, fit, "outputs")["decode"]) == {2, 4, 5}


def test_one_set_of_weights_is_fitted_to_the_tokens_of_both_stages(setting):
    model, _, _, fit, _ = setting
    gates = Gates.removing(6, prefill={3}, decode={3})
    own = (model, gates, HandoverPolicy.full(6), *setting[3:])
    blocks = repair(model, gates, own[2], fit, "shared")
    assert set(blocks["prefill"]) == {2, 4} and set(blocks["decode"]) == {2, 4, 5}
    for layer in (2, 4):
        for name, part in blocks["prefill"][layer].items():
            assert torch.equal(part, blocks["decode"][layer][name])
    # with less text than channels, twice the tokens are worth more than a fit of one's own
    few = fit[:3]
    kl = {
        kind: held_out_kl(own, repair(model, gates, own[2], few, kind))
        for kind in ("outputs", "shared")
    }
    assert kl["shared"] < kl["outputs"]


def test_none_wins_where_repairs_hurt(setting):
    model, gates, policy, _, held_out = setting
    four_tokens = random_batch(model, rows=1, prompt=3, new=2)
    kinds = dict.fromkeys(("prefill", "decode"), ("diagonal", "linear"))
    best = best_repair(model, gates, policy, four_tokens, held_out, kinds, ridge=1e-6)
    for tried in best.tried.values():
        assert tried["none"] < min(tried["diagonal"], tried["linear"])
    assert best.text == "none" and best.blocks == {"prefill": {}, "decode": {}}


def test_nothing_before_a_cut_and_nothing_removed_leave_the_weights_alone(setting):
    model, fit = setting[0], setting[3]
    policy = HandoverPolicy(rules=(LayerKV(),) * 6)
    start = Gates.removing(6, prefill={0}, decode={0})
    for gates in (start, Gates.dense(6)):
        for kind in ("diagonal", "linear"):
            assert repair(model, gates, policy, fit, kind) == {"prefill": {}, "decode": {}}
    lone = Gates.removing(6, decode={3}).model_copy(
        update={"decode_mlp": (True, True, False, False, True, True)}
    )  # the block before the cut has no MLP to fold into
    assert repair(model, lone, policy, fit, "linear")["decode"] == {}


@pytest.mark.parametrize("kind,ridge", [("magic", 0.1), ("linear", 0.0), ("linear", math.nan)])
def test_unknown_kinds_and_ridges_are_refused(setting, kind, ridge):
    model, gates, policy, fit, _ = setting
    with pytest.raises(PdtrimError, match=r"unknown repair|must be above 0"):
        repair(model, gates, policy, fit, kind, ridge=ridge)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_kv_corrects_skipped_blocks_and_no_stream(family):
    model = tiny_model(family, layers=5)
    gates = Gates.removing(5, prefill={2, 3, 4}).without_dead_work()
    policy = HandoverPolicy.full(5)
    fit, held_out = (
        random_batch(model, rows=24, prompt=24, new=4, seed=1),
        random_batch(model, rows=4),
    )
    blocks = repair(model, gates, policy, fit, "kv")
    assert blocks["decode"] == {} and set(blocks["prefill"]) == {2, 3, 4}
    names = {name for weights in blocks["prefill"].values() for name in weights}
    assert names == {"self_attn.k_proj.weight", "self_attn.v_proj.weight"}
    before, after = Pair.dense(model), swap_pair(Pair.dense(model), blocks)
    old, new = (streams(pair, held_out, gates, policy) for pair in (before, after))
    for (x_old, _), (x_new, _) in zip(old, new, strict=True):
        assert torch.equal(x_old, x_new), "prefill's stream is what it was"
    assert torch.equal(
        model.block(2).module.self_attn.k_proj.weight,
        before.prefill.block(2).module.self_attn.k_proj.weight,
    )
    teacher = Teacher.of(model, held_out)
    kls = [float(teacher.kl(model, trace[-1][1]).mean()) for trace in (old, new)]
    assert kls[1] < 0.9 * kls[0]
    same = repair(model, gates, policy, fit, "kv", kv_ridge=math.inf)
    again = streams(swap_pair(Pair.dense(model), same), held_out, gates, policy)
    torch.testing.assert_close(again[-1][1], old[-1][1], atol=1e-5, rtol=1e-5)


def test_linear_and_kv_go_together(setting):
    model, gates, policy, fit, _ = setting
    both = repair(model, gates, policy, fit, "linear+kv", stages=("prefill",))
    lone = repair(model, gates, policy, fit, "linear", stages=("prefill",))
    for layer, weights in lone["prefill"].items():
        for name, tensor in weights.items():
            assert torch.equal(both["prefill"][layer][name], tensor)
    assert set(both["prefill"]) > set(lone["prefill"]) and both["decode"] == {}
