"""The literature's methods, each against its formula by hand or by a loop over transformers."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from baselines_naive import (
    ALL,
    C,
    L,
    N,
    P,
    each,
    flatten,
    hooked_streams,
    ids_of,
    naive_order,
    nll_under,
    nll_without,
    plan_of,
    pruned,
    text_of,
)
from helpers import reference_logits, tiny_model
from pdtrim.methods.baselines import (
    SLEB,
    UIDL,
    BlockPruner,
    EvoPress,
    ShortenedPPL,
    ShortenedTaylor,
    ShortGPT,
)
from pdtrim.methods.baselines.evopress import paper_generations
from pdtrim.methods.baselines.nll import token_nll
from pdtrim.methods.baselines.shortened import taylor_salience, taylor_scores
from pdtrim.methods.baselines.shortgpt import block_influence
from pdtrim.methods.baselines.uidl import angular_distance, best_run
from pdtrim.plan import Gates
from pdtrim.search.goal import Goal


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", layers=L)


@pytest.fixture(scope="module")
def calibration(model):
    return text_of(model)


# --- the scores ---


def test_block_influence_by_hand():
    flows = [
        torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]),  # two tokens of one text
        torch.tensor([[[1.0, 1.0], [0.0, 5.0]]]),
        torch.tensor([[[1.0, 1.0], [0.0, -5.0]]]),
    ]
    half = (1 - math.sqrt(0.5)) / 2
    torch.testing.assert_close(block_influence(flows), torch.tensor([[half, 1.0]]))


def test_angular_distance_and_the_best_run_by_hand():
    turns = [torch.tensor([[math.cos(a), math.sin(a)]]) for a in (0.0, 0.5, 0.6, 2.0)]
    one, two = angular_distance(turns, 1), angular_distance(turns, 2)
    torch.testing.assert_close(one * math.pi, torch.tensor([[0.5, 0.1, 1.4]]), atol=1e-4, rtol=0)
    torch.testing.assert_close(two * math.pi, torch.tensor([[0.6, 1.5]]), atol=1e-4, rtol=0)
    asked = Goal.blocks(3, decode=1), Goal.blocks(3, decode=2)
    assert best_run(turns, asked[0], "decode", range(3)) == range(1, 2)
    assert best_run(turns, asked[0], "decode", range(2, 3)) == range(2, 3)
    assert best_run(turns, asked[1], "decode", range(3)) == range(2)
    assert best_run(turns, asked[1], "decode", range(2, 3)) == range(0)
    same = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    assert (F.cosine_similarity(same, 1.1 * same, dim=-1) > 1).any()  # rounding
    assert not angular_distance([same, 1.1 * same], 1).isnan().any()


def test_nll_and_taylor_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    expected = torch.tensor([math.log(4 / 3), math.log(2.0)])
    torch.testing.assert_close(token_nll(logits, torch.tensor([1, 0])), expected)
    weights = [torch.tensor([[1.0, -2.0]]), torch.tensor([3.0])]
    gradients = [torch.tensor([[4.0, 5.0]]), torch.tensor([-1.0])]
    assert taylor_salience(weights, gradients) == 4 + 10 + 3


def test_taylor_is_that_of_an_ordinary_forward_and_leaves_the_model_as_it_was(model, calibration):
    batch = calibration.search
    network = copy.deepcopy(model.network)
    logits = network(input_ids=ids_of(batch), use_cache=False).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), ids_of(batch)[:, 1:].flatten()).backward()
    expected = [
        sum(float((w.detach() * w.grad).abs().sum()) for w in layer.parameters())
        for layer in network.model.layers
    ]
    first = model.network.model.layers[0].mlp.up_proj.weight
    first.requires_grad_(False)
    try:
        assert taylor_scores(model, batch, rows=4) == pytest.approx(expected, rel=1e-3)
        assert not first.requires_grad
    finally:
        first.requires_grad_(True)
    assert all(w.grad is None for w in model.network.parameters())


# --- what they remove ---


@each
def test_a_block_that_is_nearly_the_identity_goes_first(method):
    for layer in (2, 4):
        model = flatten(tiny_model("llama", layers=L), layer)
        plan = plan_of(method, model, text_of(model, rows=48), 1, 1)
        assert plan.gates == pruned({layer}, {layer})


@pytest.fixture(scope="module")
def apart():
    """A model and a text whose prompt and continuation rank the blocks differently."""
    model = tiny_model("llama", layers=L, seed=5)
    return model, text_of(model, rows=1)


def test_shortgpt_removes_by_the_raw_stream_of_all_tokens(model, calibration, apart):
    for each_model, text in ((model, calibration), apart):
        seen = hooked_streams(each_model, ids_of(text.search)[:, :-1])
        cosines = [F.cosine_similarity(a, b, dim=-1) for a, b in itertools.pairwise(seen)]
        everything, prompt, other = (
            sorted(range(L), key=lambda i: -float(cosines[i][:, span].mean()))
            for span in (slice(None), slice(N), slice(N, None))
        )
        for n in range(1, L):
            plan = plan_of(ShortGPT(), each_model, text, n, n)
            assert plan.gates == pruned(everything[:n], everything[:n])
            staged = plan_of(ShortGPT(), each_model, text, n, 1, "projected")
            assert staged.gates == pruned(prompt[:n], other[:1], "projected")
    assert everything[0] != other[0] and set(everything[:2]) != set(prompt[:2])  # of ``apart``


def test_the_final_norm_does_not_count_for_the_last_block():
    model = flatten(tiny_model("llama", layers=L), L - 1)
    with torch.no_grad():  # a norm that turns the stream, which transformers' last state has seen
        model.network.model.norm.weight.copy_(torch.linspace(-2, 2, 32))
    calibration = text_of(model)
    last = {L - 1}
    assert plan_of(ShortGPT(), model, calibration, 1, 1).gates == pruned(last, last)
    assert plan_of(UIDL(), model, calibration, 1, 1).gates == pruned(last, last)


def test_uidl_removes_the_run_that_turns_the_last_token_least(model, calibration, apart):
    def run(seen, token, count):
        angle = {}
        for start in range(L - count + 1):
            a, b = (seen[i][:, token].flatten(1) for i in (start, start + count))
            cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
            angle[start] = float(torch.arccos(cosine).mean())
        start = min(angle, key=angle.get)
        return range(start, start + count)

    for each_model, text in ((model, calibration), apart):
        seen = hooked_streams(each_model, ids_of(text.search)[:, :-1])
        for n in range(1, L):
            chosen = run(seen, -1, n)
            plan = plan_of(UIDL(), each_model, text, n, n)
            assert plan.gates == pruned(chosen, chosen)
            staged = plan_of(UIDL(), each_model, text, n, 2, "projected")
            ends = run(seen, N - 1, n), run(seen, -1, 2)
            assert staged.gates == pruned(*ends, "projected")
    assert run(seen, -1, 1) != run(seen, N - 1, 1)  # of ``apart``
    assert run(seen, -1, 1) != run(seen, slice(None), 1)


def test_uidls_run_of_prefill_lies_where_decodes_turns_least():
    model = flatten(flatten(tiny_model("llama", layers=L), 2, 0.1), 3)
    plan = plan_of(UIDL(), model, text_of(model), 1, 2, "subset")
    assert plan.gates == pruned({3}, {2, 3}, "subset")


def test_sleb_removes_one_by_one_between_the_protected_blocks(model, calibration):
    batch = calibration.search

    def score(gone):
        return nll_without(model, batch, gone)

    for protected in (0, 1):
        order = naive_order(score, range(protected, L - protected), 4)
        method = SLEB(protect_first=protected, protect_last=protected)
        for count in (1, 2, 4):
            plan = plan_of(method, model, calibration, count, count)
            assert plan.gates == pruned(order[:count], order[:count])


def test_sleb_for_each_stage_alone(model, calibration):
    batch = calibration.search

    def score(prefill, decode):
        return nll_under(model, batch, Gates.removing(L, prefill=prefill, decode=decode))

    decode = naive_order(lambda gone: score((), gone), range(1, L - 1), 2)
    prefill = naive_order(lambda gone: score(gone, decode), range(1, L - 1), 1)
    plan = plan_of(SLEB(), model, calibration, 1, 2, "projected")
    assert plan.gates == pruned(prefill, decode, "projected")


def test_shortened_ppl_ranks_once(model, calibration):
    batch = calibration.search
    alone = [nll_without(model, batch, {layer}) for layer in range(L)]
    order = sorted(range(L), key=lambda i: alone[i])
    for count in (1, 3, 5):
        plan = plan_of(ShortenedPPL(), model, calibration, count, count)
        assert plan.gates == pruned(order[:count], order[:count])
    stages = {
        stage: [
            nll_under(model, batch, Gates.removing(L, **{stage: {layer}})) for layer in range(L)
        ]
        for stage in ("prefill", "decode")
    }
    prefill, decode = (sorted(range(L), key=lambda i: stages[s][i]) for s in ("prefill", "decode"))
    staged = plan_of(ShortenedPPL(), model, calibration, 3, 2, "projected")
    assert staged.gates == pruned(prefill[:3], decode[:2], "projected")


def test_shortened_taylor_takes_the_lowest_scores_that_are_not_protected(model, calibration):
    scores = taylor_scores(model, calibration.search)
    for first, last in ((0, 0), (2, 1)):
        method = ShortenedTaylor(protect_first=first, protect_last=last)
        order = sorted(range(first, L - last), key=lambda i: scores[i])
        plan = plan_of(method, model, calibration, 2, 2)
        assert plan.gates == pruned(order[:2], order[:2])


def parts_gone(units, prefill=None):
    """Gates without parts 2 * layer (attention) and 2 * layer + 1 (MLP); prefill's are inside."""
    prefill = units if prefill is None else prefill
    return Gates(
        prefill_attention=tuple("off" if 2 * i in prefill else "full" for i in range(L)),
        prefill_mlp=tuple(2 * i + 1 not in prefill for i in range(L)),
        decode_attention=tuple(2 * i not in units for i in range(L)),
        decode_mlp=tuple(2 * i + 1 not in units for i in range(L)),
    )


def test_blockpruner_removes_attention_and_mlp_apart(model, calibration):
    batch = calibration.search
    width, kv, inner, keys = 32, 16, 48, (P + C) / 2
    attention = 2 * width * width + 2 * width * kv + 2 * width * keys
    share = attention / (attention + 3 * width * inner)

    def worth(units):
        return sum(share if unit % 2 == 0 else 1 - share for unit in units)

    def prefix(order, blocks):
        length = next(n for n in range(len(order) + 1) if worth(order[:n]) >= blocks - 1e-9)
        return order[:length]

    order = naive_order(lambda gone: nll_under(model, batch, parts_gone(gone)), range(2 * L), 8)
    assert {unit % 2 for unit in order} == {0, 1}
    for count in (1, 2, 3):
        plan = plan_of(BlockPruner(), model, calibration, count, count)
        assert plan.gates == parts_gone(prefix(order, count)).without_dead_work()
    nested = plan_of(BlockPruner(), model, calibration, 1, 3, "subset")
    expected = parts_gone(prefix(order, 3), prefix(order, 1))
    assert nested.gates == expected.without_dead_work()


def test_evopress_finds_the_state_of_least_kl(model, calibration):
    batch = calibration.search
    dense = reference_logits(model, batch, Gates.dense(L)).log_softmax(-1)

    def kl(gates):
        other = reference_logits(model, batch, gates).log_softmax(-1)
        return float((dense.exp() * (dense - other)).sum(-1).mean())

    losses = {
        d: kl(Gates.removing(L, prefill=d, decode=d)) for d in itertools.combinations(range(L), 3)
    }
    best = min(losses, key=losses.get)
    plan = plan_of(EvoPress(starts=6), model, calibration, 3, 3)
    assert plan.gates == pruned(best, best)
    assert plan.provenance.search_kl == pytest.approx(losses[best], rel=1e-3)
    assert paper_generations(Goal.blocks(32, decode=8), 32) == 128  # unified: prefill follows
    assert paper_generations(Goal.blocks(32, prefill=2, decode=8), 32) == 168


def test_evopress_starts_and_breeds_by_its_seed(model, calibration):
    method = EvoPress(starts=1, offspring=2, generations=1)
    found = {plan_of(method, model, calibration, 3, 3, seed=seed).gates for seed in (0, 1, 2, 3, 4)}
    assert len(found) > 1
    parts = plan_of(ALL["evopress"], model, calibration, 2, 2, grain="part").gates
    assert any(a != m for a, m in zip(parts.decode_attention, parts.decode_mlp, strict=True))
