"""Selectors against loops written out by hand, planted needles and edge lengths.

Shapes: B rows, N prompt tokens, G KV heads, H query heads, W last tokens, D head width, E hidden
width, T positions.
"""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from fake_view import SCALE, B, D, E, FakeView, G, H, R, fake_view
from pdtrim.errors import PlanError
from pdtrim.kv.selectors import (
    H2O,
    SELECTORS,
    Duo,
    ExpectedAttention,
    FirstLast,
    Full,
    LazyLayer,
    LinearGate,
    Random,
    Selector,
    SelectorBase,
    SnapKV,
    StaticSelector,
    Tova,
)
from pdtrim.kv.selectors.duo import retrieval_score
from pdtrim.kv.selectors.expected_attention import expected_score, query_statistics
from pdtrim.kv.selectors.gate import (
    pack_weights,
)
from pdtrim.kv.selectors.scoring import keep_share

WEIGHTS = pack_weights(torch.randn(G, E + 1, generator=torch.Generator().manual_seed(1)))

# selector, first, last, share (None where no count is promised)
CASES: list[tuple[SelectorBase, int, int, float | None]] = [
    (Full(), 0, 0, 1.0),
    (FirstLast(first=2, last=5), 2, 5, 0.01),
    (Random(first=2, last=3, share=0.3), 2, 3, 0.3),
    (Random(first=2, last=3, share=0.01), 2, 3, 0.01),
    (LazyLayer(first=2, last=3, tau=0.25), 2, 3, None),
    (Duo(first=2, last=3, full_heads=(1,)), 2, 3, None),
    (SnapKV(first=2, window=6, share=0.5), 2, 6, 0.5),
    (SnapKV(first=2, window=6, share=0.5, pooling="max", pool=3), 2, 6, 0.5),
    (SnapKV(first=2, window=6, share=0.5, heads="shared"), 2, 6, 0.5),
    (SnapKV(first=0, window=1, share=0.33, pool=1, value_norm=True), 0, 1, 0.33),
    (Tova(share=0.3), 0, 1, 0.3),
    (Tova(share=0.01, first=4, last=7), 4, 7, 0.01),
    (H2O(share=0.3), 0, 1, 0.3),
    (H2O(share=0.33, recent=0.2), 0, 1, 0.33),
    (ExpectedAttention(share=0.4, horizon=16), 4, 0, 0.4),
    (ExpectedAttention(share=0.4, first=0, last=9, horizon=16, eps=0.01), 0, 9, 0.4),
    (LinearGate(weights=WEIGHTS, threshold=0.5, first=2, last=3), 2, 3, None),
]


def case_id(case: object) -> str | None:
    return case.name if isinstance(case, SelectorBase) else None  # type: ignore[attr-defined]


def test_every_selector_is_tested() -> None:
    assert {type(case[0]) for case in CASES} == set(SELECTORS.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 3, 40])
@pytest.mark.parametrize(("selector", "first", "last", "share"), CASES, ids=case_id)
def test_shape_edges_count_and_rows(
    selector: SelectorBase,
    first: int,
    last: int,
    share: float | None,
    tokens: int,
    dtype: torch.dtype,
) -> None:
    view = fake_view(tokens, dtype=dtype)
    keep_BGN = selector.keep(view)
    assert keep_BGN.shape == (B, G, tokens) and keep_BGN.dtype == torch.bool
    assert keep_BGN[..., :first].all() and keep_BGN[..., max(0, tokens - last) :].all()
    if share is not None:
        count = min(tokens, max(first + last, math.ceil(share * tokens)))
        assert (keep_BGN.sum(-1) == count).all()
    if selector.mask != "pair":
        assert selector.mask == "static" or (keep_BGN == keep_BGN[:, :1]).all()
    if selector.mask == "static":
        assert isinstance(selector, StaticSelector)
        assert (keep_BGN == selector.static_keep(G, tokens)).all()
    for row in range(B):
        assert torch.equal(selector.keep(view.row(row))[0], keep_BGN[row])


def test_share_is_rounded_up_but_not_by_floating_point() -> None:
    assert 0.07 * 100 > 7
    assert keep_share(torch.rand(1, 1, 100), 0.07, first=0, last=0).sum() == 7
    assert keep_share(torch.rand(1, 1, 100), 0.071, first=0, last=0).sum() == 8


@pytest.mark.parametrize("case", CASES, ids=lambda case: case_id(case[0]))
def test_json_round_trip(case: tuple[SelectorBase, int, int, float | None]) -> None:
    adapter: TypeAdapter[SelectorBase] = TypeAdapter(Selector)
    again = adapter.validate_json(adapter.dump_json(case[0]))
    assert again == case[0] and type(again) is type(case[0])


def test_grain_and_needs() -> None:
    assert LinearGate(weights=WEIGHTS, threshold=0).mask == "pair"
    assert SnapKV().mask == "pair" and SnapKV(heads="shared").mask == "token"
    assert SnapKV().reads_queries and not SnapKV().reads_output
    assert SnapKV(value_norm=True).reads_output
    assert not LinearGate(weights=WEIGHTS, threshold=0).reads_queries
    assert H2O().mask == "pair" and H2O().reads_queries and not H2O().reads_output
    assert Tova().reads_queries and LazyLayer().reads_queries and ExpectedAttention().reads_queries


# --- loops written out by hand


def loop_attention(view: FakeView, row: int, head: int, at: int) -> list[float]:
    """Softmax of the query at token ``at`` over what it sees, 0 on what follows it."""
    q, keys = view.q_BHND[row, head, at], view.k_BGND[row, head // R]
    weights = [math.exp(SCALE * float(q @ keys[n])) for n in range(at + 1)]
    return [w / sum(weights) for w in weights] + [0.0] * (len(keys) - at - 1)


def loop_keep(scores: list[float], count: int, always: set[int]) -> list[bool]:
    ranked = sorted(set(range(len(scores))) - always, key=lambda n: -scores[n])
    kept = always | set(ranked[: count - len(always)])
    return [n in kept for n in range(len(scores))]


@pytest.mark.parametrize("heads", ["own", "shared"])
@pytest.mark.parametrize("value_norm", [False, True])
@pytest.mark.parametrize("pooling", ["average", "max"])
def test_snapkv_by_hand(heads: str, value_norm: bool, pooling: str) -> None:
    tokens, window, pool = 40, 6, 3
    view = fake_view(tokens, seed=2)
    selector = SnapKV.model_validate(
        {
            "share": 0.5,
            "first": 2,
            "window": window,
            "pool": pool,
            "pooling": pooling,
            "heads": heads,
            "value_norm": value_norm,
        }
    )
    prefix = tokens - window
    for row in range(B):
        by_head = [[0.0] * tokens for _ in range(G)]
        for head in range(H):
            rows = [loop_attention(view, row, head, at) for at in range(prefix, tokens)]
            sums = [sum(one[n] for one in rows) for n in range(prefix)]
            for n in range(prefix):
                near = [sums[m] if 0 <= m < prefix else 0.0 for m in (n - 1, n, n + 1)]
                score = sum(near) / pool if pooling == "average" else max(near)
                if value_norm:
                    score *= float((view.v_BGND[row, head // R, n] @ view.output_HDE[head]).norm())
                by_head[head // R][n] += score / R
        if heads == "shared":
            by_head = [[sum(column) / G for column in zip(*by_head, strict=True)]] * G
        always = {0, 1, *range(prefix, tokens)}
        want = [loop_keep(scores, 20, always) for scores in by_head]
        assert selector.keep(view)[row].tolist() == want


def test_tova_by_hand() -> None:
    view = fake_view(40, seed=3)
    for row in range(B):
        by_head = [loop_attention(view, row, head, 39) for head in range(H)]
        scores = [sum(column) for column in zip(*by_head, strict=True)]
        want = loop_keep(scores, 10, {39})
        assert Tova(share=0.25).keep(view)[row].tolist() == [want] * G


def test_lazy_layer_by_hand() -> None:
    view = fake_view(40, seed=4)
    edges = [*range(2), *range(35, 40)]
    masses = []
    for row in range(B):
        by_head = [loop_attention(view, row, head, 39) for head in range(H)]
        masses.append(sum(one[n] for one in by_head for n in edges) / H)
    for row, mass in enumerate(masses):
        for tau in (mass - 1e-4, mass + 1e-4):
            kept = LazyLayer(first=2, last=5, tau=tau).keep(view)[row]
            want = [mass <= tau or n in edges for n in range(40)]
            assert kept.tolist() == [want] * G
    middle = sorted(masses)[1]
    kept_B = LazyLayer(first=2, last=5, tau=middle + 1e-4).keep(view).float().mean((1, 2))
    assert sorted(kept_B.tolist()) == pytest.approx([7 / 40, 1, 1])


def test_expected_attention_by_hand() -> None:
    tokens, first, horizon, eps = 40, 4, 16, 0.01
    view = fake_view(tokens, seed=5)
    selector = ExpectedAttention(share=0.5, first=first, horizon=horizon, eps=eps)
    half = D // 2
    rate = [100.0 ** (-i / half) for i in range(half)]
    turns = [
        sum(complex(math.cos(p * f), math.sin(p * f)) for p in range(tokens, tokens + horizon))
        / horizon
        for f in rate
    ]
    for row in range(B):
        by_head = [[0.0] * tokens for _ in range(G)]
        for head in range(H):
            queries = []
            for n in range(first, tokens):
                q = view.unrotated_BHND[row, head, n].tolist()
                turned = [complex(q[i], q[i + half]) * turns[i] for i in range(half)]
                queries.append([z.real for z in turned] + [z.imag for z in turned])
            logits = []
            for n in range(first, tokens):
                key = view.k_BGND[row, head // R, n].tolist()
                dots = [SCALE * sum(a * b for a, b in zip(q, key, strict=True)) for q in queries]
                mean = sum(dots) / len(dots)
                logits.append(mean + sum((dot - mean) ** 2 for dot in dots) / len(dots) / 2)
            total = sum(math.exp(logit) for logit in logits)
            for n, logit in enumerate(logits, first):
                by_head[head // R][n] += math.exp(logit) / total / R
        for head, scores in enumerate(by_head):
            norms = view.v_BGND[row, head].norm(dim=-1).tolist()
            scores = [(s + eps) * norm for s, norm in zip(scores, norms, strict=True)]
            want = loop_keep(scores, 20, set(range(first)))
            assert selector.keep(view)[row, head].tolist() == want


def test_expected_score_agrees_with_sampled_queries() -> None:
    view = fake_view(12, seed=6)
    rope = view.rope(torch.arange(12, 20))
    mu_BHD, sigma_BHDD = query_statistics(view.unrotated_queries(), rope)
    scale = 0.25
    args = (view.k_BGND, view.v_BGND, mu_BHD, sigma_BHDD)
    score_BGN = expected_score(*args, scale=scale, eps=0.0).exp()
    draw = torch.Generator().manual_seed(0)
    for row, head in product(range(B), range(G)):
        share_N = torch.zeros(12)
        for query_head in (head * R, head * R + 1):
            root_DD = torch.linalg.cholesky(sigma_BHDD[row, query_head] + 1e-6 * torch.eye(D))
            noise_SD = torch.randn(200_000, D, generator=draw)
            q_SD = mu_BHD[row, query_head] + noise_SD @ root_DD.mT
            weight_N = (scale * q_SD @ view.k_BGND[row, head].mT).exp().mean(0)
            share_N += weight_N / weight_N.sum() / R
        want_N = share_N * view.v_BGND[row, head].norm(dim=-1)
        torch.testing.assert_close(score_BGN[row, head], want_N, rtol=0.03, atol=0)


def test_peaked_heads_keep_their_order() -> None:
    """Shares far below the smallest fp32 number must still be ranked."""
    k_BGND = torch.arange(8.0).view(1, 1, 8, 1) * torch.ones(D)
    mu_BHD, sigma_BHDD = torch.full((1, 1, D), 10.0), torch.zeros(1, 1, D, D)
    args = (k_BGND, torch.ones(1, 1, 8, D), mu_BHD, sigma_BHDD)
    score_N = expected_score(*args, scale=1.0, eps=0.0)[0, 0]
    assert (score_N.diff() > 0).all()


def test_needle_is_found() -> None:
    needle, window = 17, 4
    view = fake_view(40, seed=7)
    toward_D = torch.ones(D)
    view.q_BHND[:, :, -window:] = toward_D
    view.k_BGND[:, :, needle] = 4 * toward_D
    assert SnapKV(share=0.25, window=window, first=2, pool=1).keep(view)[..., needle].all()
    assert Tova(share=0.05).keep(view)[..., needle].all()
    assert not FirstLast(first=2, last=8).keep(view)[..., needle].any()
    assert LazyLayer(first=2, last=8, tau=0.5).keep(view).all()


def test_group_of_the_needle_only() -> None:
    """A key that one query head wants is kept by that head's KV head and by no other."""
    view = fake_view(40, seed=8)
    view.q_BHND[:] = 0
    view.q_BHND[:, 3, -4:] = 1  # query head 3 belongs to KV head 1
    view.k_BGND[:, :, 17] = 4
    kept_BG = SnapKV(share=0.2, window=4, first=2, pool=1).keep(view)[..., 17]
    assert kept_BG.tolist() == [[False, True]] * B


# --- static selectors


def test_random_is_seeded_and_even() -> None:
    random = Random(share=0.5, first=1, last=1, seed=3)
    keep_GN = random.static_keep(3, 400)
    assert torch.equal(keep_GN, Random(share=0.5, first=1, last=1, seed=3).static_keep(3, 400))
    assert torch.equal(keep_GN[:1], random.static_keep(1, 400))
    other_GN = Random(share=0.5, first=1, last=1, seed=4).static_keep(3, 400)
    for one_N, two_N in ((keep_GN[0], keep_GN[1]), (keep_GN[0], other_GN[0])):
        assert 60 < int((one_N & two_N).sum()) < 140
    assert 60 < int(keep_GN[0, :200].sum()) < 140


def test_random_draw_is_frozen() -> None:
    """Prefill and decode may run different versions of everything."""
    kept = Random(share=0.5, first=0, last=0, seed=7).static_keep(1, 12)[0].nonzero().flatten()
    assert kept.tolist() == [2, 3, 4, 6, 8, 11]


def test_duo_mask() -> None:
    keep_GN = Duo(full_heads=(0, 2), first=1, last=2).static_keep(4, 6)
    edge = [True, False, False, False, True, True]
    assert keep_GN.tolist() == [[True] * 6, edge, [True] * 6, edge]
    assert Duo(first=1, last=2).static_keep(1, 12, block_size=4).tolist() == [
        [True] * 4 + [False] * 4 + [True] * 4
    ]


def test_duo_refuses() -> None:
    with pytest.raises(PlanError, match="KV head 2, but the layer has 2"):
        Duo(full_heads=(2,)).static_keep(2, 6)
    for heads in ((1, 0), (1, 1), (-1,)):
        with pytest.raises(ValidationError):
            Duo(full_heads=heads)


def test_retrieval_score_takes_the_neediest_query_head() -> None:
    score_G = retrieval_score(torch.tensor([0.9, 0.2, 0.7, 0.6]), 2)
    torch.testing.assert_close(score_G, torch.tensor([0.8, 0.4]))


@pytest.mark.parametrize(
    "bad",
    [
        {"name": "snapkv", "pool": 4},
        {"name": "snapkv", "window": 0},
        {"name": "snapkv", "share": 0.0},
        {"name": "tova", "share": 1.1},
        {"name": "lazy_layer", "tau": 1.5},
        {"name": "random", "seed": -1},
        {"name": "expected_attention", "horizon": 0},
        {"name": "h2o", "recent": 1.1},
        {"name": "tova", "window": 3},
        {"name": "tova", "share": math.nan},
        {"name": "nothing"},
    ],
)
def test_bad_parameters_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Selector).validate_python(bad)
