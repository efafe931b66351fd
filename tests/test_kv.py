"""Selectors, the policy grammar, and how layers are chosen."""

import pytest
import torch

from helpers import random_batch, tiny_model
from pdtrim.errors import PlanError
from pdtrim.kv.policy import HandoverPolicy, hand_over
from pdtrim.kv.request import KVRequest, concentration
from pdtrim.kv.selectors import kept_runs
from pdtrim.plan import LayerKV
from pdtrim.search.objective import dense_trace


@pytest.mark.parametrize(
    "tokens,first,last,block,runs",
    [
        (20, 4, 6, 1, ((0, 4), (14, 20))),
        (20, 0, 6, 1, ((14, 20),)),
        (20, 4, 0, 1, ((0, 4),)),
        (10, 4, 6, 1, ((0, 10),)),
        (9, 4, 6, 1, ((0, 9),)),
        (3, 4, 6, 1, ((0, 3),)),
        (0, 4, 6, 1, ()),
        (40, 3, 5, 8, ((0, 8), (32, 40))),  # outward: 3 -> 8 first, 5 -> 8 last
        (41, 3, 5, 8, ((0, 8), (32, 41))),
        (24, 9, 8, 8, ((0, 24),)),
    ],
)
def test_first_last_runs(tokens, first, last, block, runs):
    rule = LayerKV(selector="first_last", first=first, last=last)
    assert kept_runs(rule, tokens, block_size=block) == runs


def test_full_keeps_everything():
    assert kept_runs(LayerKV(), 5) == ((0, 5),)
    assert kept_runs(LayerKV(), 0) == ()


def test_hand_over_cuts_and_keeps_positions():
    k = torch.arange(2 * 3 * 10 * 4.0).view(2, 3, 10, 4)
    policy = HandoverPolicy(rules=(LayerKV(selector="first_last", first=2, last=3),))
    k_kept, v_kept, positions = hand_over(policy, 0, k, -k)
    assert positions.tolist() == [0, 1, 7, 8, 9]
    assert torch.equal(k_kept, k[:, :, positions]) and torch.equal(v_kept, -k[:, :, positions])
    assert policy.kept(0, 10) == 5


@pytest.mark.parametrize(
    "text,words",
    [
        ("nearest", "nearest|selector"),
        ("first_last:first", "not option=value"),
        ("first_last:colour=4", "colour"),
        ("first_last:first=-1", "first"),
        ("first_last:layers=some", "layers"),
        ("full:first=1", "takes no options"),
    ],
)
def test_a_bad_policy_is_refused(text, words):
    with pytest.raises(PlanError, match=words):
        KVRequest.parse(text)


def test_concentration_is_measured_for_each_head():
    model = tiny_model("llama", layers=3)
    batch = random_batch(model, prompt=13, new=5)
    with torch.no_grad():
        model.block(1).attention.q_proj.weight[:8] = 0  # head 0 of layer 1: uniform attention
    trace = dense_trace(model, batch)
    rule = LayerKV(selector="first_last", first=1, last=2)
    mass_LH = concentration(model, batch, trace, rule)
    assert mass_LH.shape == (3, 4)
    assert mass_LH[1, 0] == pytest.approx(3 / 12)
    everything = LayerKV(selector="first_last", first=6, last=6)
    torch.testing.assert_close(concentration(model, batch, trace, everything), torch.ones(3, 4))


def test_layers_are_chosen_where_attention_concentrates(monkeypatch):
    model = tiny_model("llama", layers=3)
    batch = random_batch(model)
    mass_LH = torch.tensor([[0.9, 0.9, 0.1, 0.1], [0.9, 0.1, 0.1, 0.1], [0.9, 0.9, 0.9, 0.85]])
    monkeypatch.setattr("pdtrim.kv.request.concentration", lambda *a, **k: mass_LH)

    def selected(text):
        rules = KVRequest.parse(text).resolve(model, batch, [])
        return [i for i, rule in enumerate(rules) if rule.selector == "first_last"]

    assert selected("first_last:first=1,last=1") == [0, 2]
    assert selected("first_last:first=1,last=1,cutoff=0.89") == [0, 2]
    assert selected("first_last:first=1,last=1,layers=1") == [2]
    assert selected("first_last:first=1,last=1,layers=2") == [0, 2]
    assert selected("first_last:first=1,last=1,layers=all") == [0, 1, 2]
    assert selected("full") == []
    with pytest.raises(PlanError, match="layers=9"):
        selected("first_last:layers=9")
    with pytest.raises(PlanError, match="at least one token"):
        selected("first_last:first=0,last=0")
