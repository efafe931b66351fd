"""Repairs on text that no fit has seen: they help, and none is chosen where all do harm."""

import math

import pytest
import torch

from helpers import first_last, random_batch, tiny_model, trimmed
from pdtrim.calibration.score import Score
from pdtrim.calibration.teacher import Teacher
from pdtrim.errors import PdtrimError
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.plan import Gates, LayerKV
from pdtrim.repair import linear
from pdtrim.repair.apply import KINDS, RIDGE, SHARED, best_repair, repair
from pdtrim.repair.held_out import HeldOut
from pdtrim.search.objective import dense_trace
from pdtrim.stage.forward import Pair
from pdtrim.stage.swap import swap_pair


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
        y = trimmed(pair, gates, policy).streams(held_out)[-1][1]
        return float(Teacher.of(model, held_out).kl(pair.decode, y).mean())


def test_linear_lowers_kl_and_an_infinite_ridge_does_nothing(setting):
    model, gates, policy, fit, _ = setting
    none = held_out_kl(setting, {})
    blocks = repair(model, trimmed(model, gates, policy), fit, "linear")
    assert (set(blocks["prefill"]), set(blocks["decode"])) == ({1}, {2})
    assert held_out_kl(setting, blocks) < 0.97 * none
    with torch.no_grad():
        dense = dense_trace(model, fit)[4]
        bare, repaired = (
            trimmed(swap_pair(Pair.dense(model), b), gates, policy).streams(fit)[4]
            for b in ({}, blocks)
        )
    for side in (0, 1):  # the streams behind the cut, prefill's and decode's
        assert (repaired[side] - dense[side]).norm() < 0.95 * (bare[side] - dense[side]).norm()
    for kind in ("linear", "diagonal"):
        same = repair(model, trimmed(model, gates, policy), fit, kind, ridge=math.inf)
        for stage, layer in (("prefill", 1), ("decode", 2)):
            torch.testing.assert_close(
                same[stage][layer]["mlp.down_proj.weight"],
                model.block(layer).module.mlp.down_proj.weight.detach(),
            )


def test_a_later_cut_is_fitted_with_the_earlier_repairs_in_place():
    model, gates = tiny_model("llama", layers=6), Gates.removing(6, prefill={2, 4}, decode={2, 4})
    policy = HandoverPolicy.full(6)
    fit = random_batch(model, rows=12, prompt=12, new=10, seed=1)
    whole = repair(model, trimmed(model, gates, policy), fit, "linear")
    first = {stage: {1: whole[stage][1]} for stage in whole}
    pair = swap_pair(Pair.dense(model), first)
    with torch.no_grad():
        dense = dense_trace(model, fit)
        off = gates.model_copy(update={"decode_mlp": (True, True, False, False, False, True)})
        y = trimmed(pair, off, policy).streams(fit)[4][1].flatten(0, 1)  # layer 3 without its MLP
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
    blocks = repair(model, trimmed(spoilt, gates, policy), fit, "linear")
    assert held_out_kl(setting, blocks, spoilt) < 0.9 * held_out_kl(setting, {}, spoilt)


def test_the_best_repair_is_chosen_on_held_out_text(setting):
    model, gates, policy, fit, held_out = setting
    best = best_repair(model, trimmed(model, gates, policy), fit, held_out)
    assert best.tried["prefill"]["none"] == pytest.approx(held_out_kl(setting, {}), rel=1e-5)
    assert best.score.kl == pytest.approx(held_out_kl(setting, best.blocks), rel=1e-5)
    for stage, tried in best.tried.items():
        both = SHARED if stage == "decode" else ()
        assert list(tried) == [*KINDS[stage], *both]
        if not set(best.kinds.values()) <= set(SHARED):
            assert tried[best.kinds[stage]] == min(tried.values())
    # decode's repair is tried on prefill's, whose keys go less of the way where that is better
    assert best.tried["decode"]["none"] < min(best.tried["prefill"].values())
    assert best.score.kl == min(best.tried["decode"].values()) and best.text != "none"
    alone = repair(model, trimmed(model, gates, policy), fit, "linear", stages=("decode",))
    assert alone["prefill"] == {} and alone["decode"]


def test_outputs_repairs_a_lone_attention_and_more_than_the_block_before_a_cut(setting):
    model, gates, policy, fit, _ = setting
    lone = Gates.dense(6).model_copy(
        update={"decode_attention": (True, True, False, True, True, True)}
    )
    for off, stages in ((lone, ("decode",)), (gates, ("prefill", "decode"))):
        own = (model, off, HandoverPolicy.full(6), *setting[3:])
        blocks = repair(model, trimmed(model, off, own[2]), fit, "outputs", stages=stages)
        old = repair(model, trimmed(model, off, own[2]), fit, "linear", stages=stages)
        assert held_out_kl(own, blocks) < 0.98 * held_out_kl(own, old)
    assert set(repair(model, trimmed(model, lone, policy), fit, "outputs")["decode"]) == {
        2,
        3,
        4,
        5,
    }
    assert set(repair(model, trimmed(model, gates, policy), fit, "outputs")["decode"]) == {2, 4, 5}


def test_one_set_of_weights_is_fitted_to_the_tokens_of_both_stages(setting):
    model, _, _, fit, _ = setting
    gates = Gates.removing(6, prefill={3}, decode={3})
    own = (model, gates, HandoverPolicy.full(6), *setting[3:])
    blocks = repair(model, trimmed(model, gates, own[2]), fit, "shared")
    assert set(blocks["prefill"]) == {2, 4} and set(blocks["decode"]) == {2, 4, 5}
    for layer in (2, 4):
        for name, part in blocks["prefill"][layer].items():
            assert torch.equal(part, blocks["decode"][layer][name])
    # with less text than channels, twice the tokens are worth more than a fit of one's own
    few = fit[:3]
    kl = {
        kind: held_out_kl(own, repair(model, trimmed(model, gates, own[2]), few, kind))
        for kind in ("outputs", "shared")
    }
    assert kl["shared"] < kl["outputs"]


def test_none_wins_where_repairs_hurt(setting):
    model, gates, policy, _, held_out = setting
    four_tokens = random_batch(model, rows=1, prompt=3, new=2)
    kinds = dict.fromkeys(("prefill", "decode"), ("diagonal", "linear"))
    best = best_repair(
        model, trimmed(model, gates, policy), four_tokens, held_out, kinds, ridge=1e-6
    )
    for tried in best.tried.values():
        assert tried["none"] < min(tried["diagonal"], tried["linear"])
    assert best.text == "none" and best.blocks == {"prefill": {}, "decode": {}}


def test_nothing_before_a_cut_and_nothing_removed_leave_the_weights_alone(setting):
    model, fit = setting[0], setting[3]
    policy = HandoverPolicy(rules=(LayerKV(),) * 6)
    start = Gates.removing(6, prefill={0}, decode={0})
    for gates in (start, Gates.dense(6)):
        for kind in ("diagonal", "linear"):
            assert repair(model, trimmed(model, gates, policy), fit, kind) == {
                "prefill": {},
                "decode": {},
            }
    lone = Gates.removing(6, decode={3}).model_copy(
        update={"decode_mlp": (True, True, False, False, True, True)}
    )  # the block before the cut has no MLP to fold into
    assert repair(model, trimmed(model, lone, policy), fit, "linear")["decode"] == {}


@pytest.mark.parametrize("kind,ridge", [("magic", 0.1), ("linear", 0.0), ("linear", math.nan)])
def test_unknown_kinds_and_ridges_are_refused(setting, kind, ridge):
    model, gates, policy, fit, _ = setting
    with pytest.raises(PdtrimError, match=r"unknown repair|must be above 0"):
        repair(model, trimmed(model, gates, policy), fit, kind, ridge=ridge)


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2", "qwen3"])
def test_kv_corrects_skipped_blocks_and_no_stream(family):
    model = tiny_model(family, layers=5)
    gates = Gates.removing(5, prefill={2, 3, 4}).without_dead_work()
    policy = HandoverPolicy.full(5)
    fit, held_out = (
        random_batch(model, rows=24, prompt=24, new=4, seed=1),
        random_batch(model, rows=4),
    )
    blocks = repair(model, trimmed(model, gates, policy), fit, "kv")
    assert blocks["decode"] == {} and set(blocks["prefill"]) == {2, 3, 4}
    names = {name for weights in blocks["prefill"].values() for name in weights}
    made = {model.block(0).making(made).name for made in ("keys", "values")}
    assert names == {f"{name}.weight" for name in made}
    before, after = Pair.dense(model), swap_pair(Pair.dense(model), blocks)
    old, new = (trimmed(pair, gates, policy).streams(held_out) for pair in (before, after))
    for (x_old, _), (x_new, _) in zip(old, new, strict=True):
        assert torch.equal(x_old, x_new), "prefill's stream is what it was"
    assert torch.equal(
        model.block(2).matrix("keys").weight,
        before.prefill.block(2).matrix("keys").weight,
    )
    teacher = Teacher.of(model, held_out)
    kls = [float(teacher.kl(model, trace[-1][1]).mean()) for trace in (old, new)]
    assert kls[1] < 0.9 * kls[0]
    same = repair(model, trimmed(model, gates, policy), fit, "kv", kv_ridge=math.inf)
    again = trimmed(swap_pair(Pair.dense(model), same), gates, policy).streams(held_out)
    torch.testing.assert_close(again[-1][1], old[-1][1], atol=1e-5, rtol=1e-5)


def test_kv_leaves_queries_that_are_fused_with_keys_and_values():
    """A selector of a skipped block may read its queries."""
    model = tiny_model("phi3", layers=5)
    gates = Gates.removing(5, prefill={2, 3, 4}).without_dead_work()
    fit, block = random_batch(model, rows=8), model.block(3)
    made = repair(model, trimmed(model, gates, HandoverPolicy.full(5)), fit, "kv")["prefill"][3]
    (new,), old = made.values(), block.matrix("keys").weight
    assert torch.equal(new[block.span("queries")], old[block.span("queries")])
    for part in ("keys", "values"):
        assert not torch.allclose(new[block.span(part)], old[block.span(part)], atol=1e-4)


@pytest.mark.parametrize("likes", [0.0, 0.2, 0.55, 0.7, 1.0])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_keys_go_as_much_of_the_way_as_is_best(family, likes):
    """Values all of it; judged by a judge that likes keys which have gone some share."""
    model = tiny_model(family, layers=5)
    gates = Gates.removing(5, prefill={2, 3, 4}).without_dead_work()
    fit, start = random_batch(model, rows=8), trimmed(model, gates, HandoverPolicy.full(5))
    whole = repair(model, start, fit, "kv")["prefill"][3]
    name, rows = f"{model.block(3).making('keys').name}.weight", model.block(3).span("keys")
    old = model.block(3).module.get_parameter(name)[rows]

    class Judge(HeldOut):
        def score(self, pair):
            keys = pair.pair.prefill.block(3).module.get_parameter(name)[rows]
            gone = float((keys - old).norm() / (whole[name][rows] - old).norm())
            return Score(kl=abs(gone - likes))

    best = best_repair(model, start, fit, Judge(model, fit), {"prefill": ("kv",), "decode": ()})
    nearest = min((0, 0.5, 0.75, 1), key=lambda share: abs(share - likes))
    assert best.score.kl == pytest.approx(abs(nearest - likes), abs=1e-3)
    assert (best.kinds["prefill"], best.keys) == (("kv", nearest) if nearest else ("none", 1))
    assert ("of the way" in best.text) == (0 < nearest < 1)
    made = best.blocks["prefill"].get(3, {})
    for other, weight in made.items():
        same = torch.ones(len(weight), dtype=torch.bool)
        if other == name:
            same[rows] = False
        assert torch.equal(weight[same], whole[other][same])


def test_linear_and_kv_go_together(setting):
    model, gates, policy, fit, _ = setting
    both = repair(model, trimmed(model, gates, policy), fit, "linear+kv", stages=("prefill",))
    lone = repair(model, trimmed(model, gates, policy), fit, "linear", stages=("prefill",))
    for layer, weights in lone["prefill"].items():
        for name, tensor in weights.items():
            assert torch.equal(both["prefill"][layer][name], tensor)
    assert set(both["prefill"]) > set(lone["prefill"]) and both["decode"] == {}
