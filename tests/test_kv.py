"""Selectors, the policy grammar, and how layers are chosen."""

import pytest
import torch

from helpers import random_batch, tiny_model
from pdtrim.errors import PlanError
from pdtrim.kv.codecs import parse_codec
from pdtrim.kv.frame import SentLayer
from pdtrim.kv.join import join
from pdtrim.kv.policy import gather, through
from pdtrim.kv.selectors import FirstLast, Full
from pdtrim.kvfit.observed import Observed
from pdtrim.kvfit.request import KVRequest


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
    keep_GN = FirstLast(first=first, last=last).static_keep(2, tokens, block_size=block)
    kept = {i for start, stop in runs for i in range(start, stop)}
    assert keep_GN.tolist() == [[i in kept for i in range(tokens)]] * 2


def test_full_keeps_everything():
    assert Full().static_keep(2, 5).all() and Full().static_keep(2, 0).shape == (2, 0)


class View:
    def __init__(self, k, v):
        self.k_BGND, self.v_BGND = k, v


def random_view(rows=3, heads=4, tokens=10, width=4):
    torch.manual_seed(0)
    shape = (rows, heads, tokens, width)
    return View(torch.randn(shape), torch.randn(shape))


def test_gather_groups_heads_by_what_they_keep_and_keeps_positions():
    view = random_view()
    keep = torch.rand(3, 4, 10) < 0.5
    keep[:, 1] = keep[:, 3].roll(2, dims=-1)  # heads 1 and 3 keep equally many, not the same
    keep[:, 2] = True
    groups = gather(view, keep)
    assert sorted(h for g in groups for h in g.heads) == [0, 1, 2, 3]
    assert any(set(g.heads) >= {1, 3} for g in groups)
    for group in groups:
        for row in range(3):
            for i, head in enumerate(group.heads):
                wanted = keep[row, head].nonzero()[:, 0]
                count = len(wanted)
                assert group.positions_BgM[row, i, :count].equal(wanted)
                assert group.k_BgMD[row, i, :count].equal(view.k_BGND[row, head, wanted])
                assert group.v_BgMD[row, i, :count].equal(view.v_BGND[row, head, wanted])
                if group.padded_BM is None:
                    assert group.k_BgMD.shape[2] == count
                else:
                    assert (~group.padded_BM[row]).nonzero()[:, 0].tolist() == list(range(count))


def test_rows_of_a_batch_go_through_the_codec_each_by_itself():
    view = random_view(tokens=40)
    keep = torch.zeros(3, 4, 40, dtype=torch.bool)
    for row, count in enumerate((5, 17, 40)):
        keep[row, :, :count] = True
    codec = parse_codec("int4:first=0,recent=0,group=8")
    (group,) = [through(codec, g) for g in gather(view, keep)]
    for row, count in enumerate((5, 17, 40)):
        k, v = codec.round_trip(view.k_BGND[row, :, :count], view.v_BGND[row, :, :count])
        assert group.k_BgMD[row, :, :count].equal(k) and group.v_BgMD[row, :, :count].equal(v)


def test_join_puts_requests_side_by_side():
    views = [random_view(rows=1, tokens=n) for n in (3, 10, 7)]
    sent, keeps = [], []
    for view in views:
        keep = torch.rand(1, 4, view.k_BGND.shape[2]) < 0.6
        keep[:, 2] = keep[:, 0]
        keeps.append(keep[0])
        sent.append(SentLayer(keep_GN=keep[0], groups=gather(view, keep)))
    for group in join(sent):
        for row, keep_GN in enumerate(keeps):
            for i, head in enumerate(group.heads):
                wanted = keep_GN[head].nonzero()[:, 0]
                count = len(wanted)
                assert group.k_BgMD[row, i, :count].equal(views[row].k_BGND[0, head, wanted])
                assert group.positions_BgM[row, i, :count].equal(wanted)
                hidden = 0 if group.padded_BM is None else int(group.padded_BM[row].sum())
                assert hidden == group.k_BgMD.shape[2] - count


@pytest.mark.parametrize(
    "text,words",
    [
        ("nearest", "unknown selector"),
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
    observed = Observed.of(model, batch)
    mass_LH = observed.concentration(FirstLast(first=1, last=2))
    assert mass_LH.shape == (3, 4)
    assert mass_LH[1, 0] == pytest.approx(3 / 12)
    everything = FirstLast(first=6, last=6)
    torch.testing.assert_close(observed.concentration(everything), torch.ones(3, 4))


def test_layers_are_chosen_where_attention_concentrates(monkeypatch):
    model = tiny_model("llama", layers=3)
    batch = random_batch(model)
    mass_LH = torch.tensor([[0.9, 0.9, 0.1, 0.1], [0.9, 0.1, 0.1, 0.1], [0.9, 0.9, 0.9, 0.85]])
    monkeypatch.setattr(Observed, "concentration", lambda *_: mass_LH)

    def selected(text):
        rules = KVRequest.parse(text).resolve(model, batch)
        return [i for i, rule in enumerate(rules) if rule.selector.name == "first_last"]

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
