"""Narrower blocks: what they compute, in a model and in a pair."""

import pytest
import torch

from helpers import pair_of, random_batch, reference_logits
from narrow_models import (
    GATES,
    L,
    biases,
    grouped,
    narrow_plan,
    silenced,
    two_models,
    width,
    widths,
)
from pdtrim.kv.policy import HandoverPolicy, hand_over, select
from pdtrim.kv.selectors import ExpectedAttention, SnapKV, Tova
from pdtrim.models.narrow import narrow_blocks
from pdtrim.plan import STAGES, LayerKV, Widths
from pdtrim.stage.forward import Pair, forward
from pdtrim.stage.generate import prefill


@pytest.fixture(scope="module")
def model():
    return grouped("llama")


# --- one model ---


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2", "qwen3"])
def test_a_narrower_block_is_the_dense_one_with_silent_heads_and_neurons(family):
    model = grouped(family)
    if family == "qwen2":
        assert model.block(0).attention.q_proj.bias is not None
    batch, kept = random_batch(model), widths().prefill
    narrow = narrow_blocks(model, {i: w for i, w in enumerate(kept) if w})
    with torch.no_grad():
        ours = forward(Pair.dense(narrow), batch, GATES[0])
        theirs = silenced(model, kept).network(batch.prompt_BP).logits
    wanted = reference_logits(silenced(model, kept), batch, GATES[0])
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
    if family != "phi3":  # transformers cuts its fused rows by the config's head counts
        with torch.no_grad():
            plain = narrow.network(batch.prompt_BP).logits
        torch.testing.assert_close(plain, theirs, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours, reference_logits(model, batch, GATES[0]), atol=1e-2)


def test_only_what_is_cut_is_copied(model):
    before = {name: p.clone() for name, p in model.network.named_parameters()}
    narrow = narrow_blocks(model, {2: width((1, 2), 3)})
    old, new = (dict(m.network.named_parameters()) for m in (model, narrow))
    cut = {f"self_attn.{p}_proj" for p in "qkvo"} | {
        f"mlp.{p}_proj" for p in ("gate", "up", "down")
    }
    changed = {name for name in old if new[name] is not old[name]}
    assert changed == {f"model.layers.2.{part}.weight" for part in cut}
    assert all(torch.equal(p, before[name]) for name, p in old.items())
    attention = narrow.block(2).attention
    assert attention.k_proj.weight.shape[0] == 2 * 8 and attention.o_proj.weight.shape[1] == 32
    block = model.block(2).attention
    assert torch.equal(attention.k_proj.weight, block.k_proj.weight[8:24])
    assert torch.equal(attention.q_proj.weight, block.q_proj.weight[16:48])


# --- a pair ---


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2", "qwen3"])
def test_stages_of_different_widths_compute_what_two_silenced_models_do(family, gates, tmp_path):
    model = grouped(family)
    plan, batch = narrow_plan(model, tmp_path, gates=gates), random_batch(model, rows=3)
    pair = pair_of(plan, model, tmp_path)
    with torch.no_grad():
        ours = forward(pair, batch, gates, HandoverPolicy.of(plan))
    of = {s: silenced(model, plan.widths.of(s), biases(model)[s]) for s in STAGES}
    wanted = two_models(of["prefill"], of["decode"], batch, gates)
    torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)
    bare = two_models(of["prefill"], silenced(model, plan.widths.decode), batch, gates)
    assert not torch.allclose(ours, bare, atol=1e-2)  # the biases matter


def test_equal_widths_share_one_model(model, tmp_path):
    same = Widths(prefill=widths().prefill, decode=widths().prefill)
    pair = pair_of(narrow_plan(model, given=same), model, None)
    assert pair.prefill is pair.decode and pair.decode is not model
    apart = pair_of(narrow_plan(model, tmp_path), model, tmp_path)
    assert apart.prefill is not apart.decode
    wide = Widths(prefill=(None,) * L, decode=widths().decode)
    assert pair_of(narrow_plan(model, given=wide), model, None).prefill is model


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_view_of_some_heads_is_the_view_of_a_block_that_has_no_others(family):
    model, prompt = grouped(family), random_batch(grouped(family), prompt=20).prompt_BP
    whole = dict(prefill(model, prompt, GATES[0]))[0]
    narrow = narrow_blocks(model, {0: width((0, 2, 3), 5)})
    few = dict(prefill(narrow, prompt, GATES[0]))[0].heads((1, 2))
    for view in (whole.heads((2, 3)), whole.heads((0, 2, 3)).heads((1, 2)), few):
        alone = narrow_blocks(model, {0: width((2, 3), 2)})
        wanted = dict(prefill(alone, prompt, GATES[0]))[0]
        for one in (lambda v: v, lambda v: v.row(1, 11)):
            ours, theirs = one(view), one(wanted)
            assert ours.k_BGND.shape[1] == 2
            for name in ("k_BGND", "v_BGND"):
                torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
            torch.testing.assert_close(ours.queries(5), theirs.queries(5))
            torch.testing.assert_close(ours.unrotated_queries(), theirs.unrotated_queries())
            torch.testing.assert_close(ours.output_weight(), theirs.output_weight())


@pytest.mark.parametrize(
    "selector",
    [SnapKV(window=3, share=0.6, value_norm=True), ExpectedAttention(share=0.5), Tova(share=0.5)],
    ids=lambda s: s.name,
)
def test_what_travels_is_chosen_among_the_heads_that_decode_keeps(model, selector):
    rules = (LayerKV(selector=selector),) * L
    plan = narrow_plan(model, kv=rules)
    prompt = random_batch(model, prompt=20).prompt_BP
    policy = HandoverPolicy.of(plan)
    assert policy.places == ((0, 2), (1, 3), (1,), None)
    view = dict(prefill(pair_of(plan, model, None).prefill, prompt, GATES[0]))[0]
    alone = narrow_blocks(model, {0: width((0, 3), 2)})
    wanted = dict(prefill(alone, prompt, GATES[0]))[0]
    assert torch.equal(select(policy, 0, view).keep_BGN, selector.keep(wanted))
    plain = hand_over(HandoverPolicy(rules=rules), 0, wanted)
    for ours, theirs in zip(hand_over(policy, 0, view), plain, strict=True):
        assert ours.heads == theirs.heads
        torch.testing.assert_close(ours.k_BgMD, theirs.k_BgMD)
        assert torch.equal(ours.positions_BgM, theirs.positions_BgM)
