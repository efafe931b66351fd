"""The two KV baselines: H2O, and StreamingLLM as a preset of the policy grammar.

Shapes: B rows, N prompt tokens, G KV heads, H query heads, R = H / G, D head width.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fake_view import SCALE, B, FakeView, G, R, fake_view
from helpers import make_plan, random_batch, tiny_model
from pdtrim.engines.pages import check_servable
from pdtrim.errors import PlanError
from pdtrim.evaluate.kv_sweep import default_policies
from pdtrim.kv.codecs import parse_codec
from pdtrim.kv.selectors import H2O, FirstLast, Full
from pdtrim.kv.selectors import h2o as module
from pdtrim.kv.selectors.h2o import attention_mass
from pdtrim.kvfit.observed import Observed
from pdtrim.kvfit.request import KVRequest
from pdtrim.models.model import Model
from pdtrim.plan import Gates, LayerKV


def hand_view() -> FakeView:
    """Four tokens, one KV head of two query heads, width 1, exp(key) = 1, 2, 4, 1.

    Query head 0 looks evenly at what it sees. Query head 1 weighs keys by 1, 2, 4, 1.
    """
    view = fake_view(4)
    view.k_BGND = torch.tensor([1.0, 2, 4, 1]).log().view(1, 1, 4, 1)
    view.v_BGND = torch.ones(1, 1, 4, 1)
    view.q_BHND = torch.stack((torch.zeros(4), torch.ones(4))).view(1, 2, 4, 1)
    view.scale = 1.0
    return view


def direct_mass(view: FakeView) -> Tensor:
    """The same sums from the whole [N, N] matrix."""
    N = view.k_BGND.shape[2]
    k_BHND = view.k_BGND.repeat_interleave(R, dim=1)
    logit_BHNN = SCALE * view.q_BHND @ k_BHND.mT
    seen_NN = torch.ones(N, N, dtype=torch.bool).tril()
    share_BHNN = logit_BHNN.masked_fill(~seen_NN, -torch.inf).softmax(-1)
    return share_BHNN.sum(2).unflatten(1, (G, R)).sum(2)


def test_mass_by_hand() -> None:
    view = hand_view()
    even = (1 + 1 / 2 + 1 / 3 + 1 / 4, 1 / 2 + 1 / 3 + 1 / 4, 1 / 3 + 1 / 4, 1 / 4)
    weighed = (1 + 1 / 3 + 1 / 7 + 1 / 8, 2 / 3 + 2 / 7 + 2 / 8, 4 / 7 + 4 / 8, 1 / 8)
    want = [a + b for a, b in zip(even, weighed, strict=True)]  # 3.68, 2.29, 1.65, 0.38
    mass_BGN = attention_mass(view.q_BHND, view.k_BGND, view.scale)
    assert mass_BGN.flatten().tolist() == pytest.approx(want)


@pytest.mark.parametrize(
    ("share", "recent", "kept"),
    [
        (0.5, 0.5, [0, 3]),
        (0.5, 0.0, [0, 1]),
        (0.5, 1.0, [2, 3]),
        (0.75, 0.5, [0, 2, 3]),  # an odd budget: the odd one is recent
        (0.25, 0.5, [3]),
        (1.0, 0.5, [0, 1, 2, 3]),
    ],
)
def test_kept_by_hand(share: float, recent: float, kept: list[int]) -> None:
    keep_N = H2O(share=share, recent=recent).keep(hand_view())[0, 0]
    assert keep_N.nonzero().flatten().tolist() == kept


def test_each_kv_head_has_its_own_hitters() -> None:
    view = fake_view(40, seed=3)
    view.k_BGND[:, :, 11] = 4
    view.q_BHND[:] = 0
    view.q_BHND[:, R:] = 1  # the query heads of KV head 1
    kept_BG = H2O(share=0.25).keep(view)[..., 11]
    assert kept_BG.tolist() == [[False, True]] * B


def test_a_middle_query_counts_as_much_as_the_last() -> None:
    """What SnapKV and TOVA cannot see: only queries 12 to 19 ask for token 11."""
    view = fake_view(40, seed=4)
    view.q_BHND[:] = 0
    view.q_BHND[:, :, 12:20] = 1
    view.k_BGND[:, :, 11] = 4
    assert H2O(share=0.25).keep(view)[..., 11].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 3, 7, 16, 21, 64])
def test_sums_in_chunks_are_the_direct_product(chunk: int, dtype: torch.dtype) -> None:
    view = fake_view(21, seed=5, dtype=dtype)
    mass_BGN = attention_mass(view.q_BHND, view.k_BGND, SCALE, chunk=chunk)
    view.q_BHND, view.k_BGND = view.q_BHND.float(), view.k_BGND.float()
    assert mass_BGN.dtype == torch.float32
    torch.testing.assert_close(mass_BGN, direct_mass(view), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mass_BGN.sum(-1), torch.full((B, G), 21.0 * R))


def test_no_matrix_of_all_queries_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counted(q_BHCD: Tensor, k_BGSD: Tensor, scale: float) -> Tensor:
        made.append((q_BHCD.shape[2], k_BGSD.shape[2]))
        return plain(q_BHCD, k_BGSD, scale)

    plain = module.window_attention
    monkeypatch.setattr(module, "window_attention", counted)
    H2O().keep(fake_view(2 * module.CHUNK + 5))
    assert made == [(64, 64), (64, 128), (5, 133)]


def test_vllm_refuses_h2o_and_serves_streaming() -> None:
    model, gates = tiny_model("llama", layers=2), Gates.dense(2)
    with pytest.raises(PlanError, match="layer 1: vLLM's pages cannot hold what 'h2o' keeps"):
        check_servable(make_plan(model, gates, (LayerKV(), LayerKV(selector=H2O())), 16), 16)
    check_servable(make_plan(model, gates, resolved("streaming:last=8", model), 16), 16)


# --- StreamingLLM


def resolved(policy: str, model: Model, prompt: int = 41) -> tuple[LayerKV, ...]:
    batch = random_batch(model, prompt=prompt)
    return KVRequest.parse(policy).resolve(model, batch)


@pytest.mark.parametrize(
    ("policy", "first", "last"),
    [
        ("streaming", 4, 16),  # half of the 40 tokens handed over
        ("streaming:share=0.3", 4, 8),
        ("streaming:share=0.31", 4, 9),
        ("streaming:share=0.05", 4, 1),  # the last token stays, whatever the share
        ("streaming:share=0.3,first=2", 2, 10),
        ("streaming:last=7", 4, 7),
    ],
)
def test_streaming_is_first_last_in_every_layer(policy: str, first: int, last: int) -> None:
    rules = resolved(f"{policy}+int4", tiny_model("llama", layers=3))
    assert [rule.selector for rule in rules] == [FirstLast(first=first, last=last)] * 3
    assert {rule.codec for rule in rules} == {parse_codec("int4")}


def test_a_share_of_streaming_is_that_share_of_the_calibration_prompt() -> None:
    for prompt in (21, 61):
        rule, *_ = resolved("streaming:share=0.4", tiny_model("llama", layers=1), prompt)
        assert isinstance(rule.selector, FirstLast)
        kept = rule.selector.static_keep(1, prompt - 1).sum()
        assert kept == math.ceil(0.4 * (prompt - 1) - 1e-9)


def test_streaming_takes_the_layers_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def mass(observed: Observed, rule: FirstLast) -> Tensor:
        asked.append(rule)
        return torch.tensor([[0.1] * 4, [0.9] * 4])

    monkeypatch.setattr(Observed, "concentration", mass)
    rules = resolved("streaming:share=0.3,layers=1", tiny_model("llama", layers=2))
    assert [rule.selector for rule in rules] == [Full(), FirstLast(first=4, last=8)]
    assert asked == [FirstLast(first=4, last=8)], "layers are chosen by the rule that will hold"


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("streaming:share=0.3,last=7", "give share or last, not both"),
        ("streaming:share=1.5", "share: .*less than or equal to 1"),
        ("streaming:share=x", "share: "),
        ("streaming:last=-1", "last"),
        ("streaming:window=4", "window"),
        ("sinks", "unknown selector 'sinks'.* h2o.* streaming"),
    ],
)
def test_bad_streaming_policies_are_refused(policy: str, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        KVRequest.parse(policy)


@pytest.mark.parametrize("compression", [2.5, 10.0])
def test_the_sweep_measures_both_baselines(compression: float) -> None:
    policies, model = default_policies(8, 40, 1), tiny_model("llama", layers=1)
    share = 1 / compression
    (heavy,) = resolved(policies[f"h2o@{compression}x"], model)
    assert heavy.selector == H2O(share=share)
    swept = resolved(policies[f"first_last@{compression}x"], model)
    assert swept == resolved(f"streaming:share={share}", model)
