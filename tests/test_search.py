"""The searches, against enumeration where that is possible."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F

from helpers import random_batch, tiny_model, trimmed
from pdtrim.calibration.batches import Calibration
from pdtrim.calibration.teacher import Teacher
from pdtrim.distill.sets import similarity
from pdtrim.errors import PlanError
from pdtrim.kvfit.policy import parse_policy
from pdtrim.methods import Paper, PDTrim, Target
from pdtrim.plan import Gates
from pdtrim.search.anneal import Annealing, accepts, anneal, swap
from pdtrim.search.goal import Goal
from pdtrim.search.greedy import greedy
from pdtrim.search.objective import BudgetSpent, Objective, cosine_loss, dense_trace
from pdtrim.search.one_shot import one_shot
from pdtrim.search.state import Removal
from pdtrim.stage.forward import Pair, forward


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", layers=6)


def calibration_of(model, rows=4):
    parts = [random_batch(model, rows=rows, prompt=10, new=6, seed=s) for s in (1, 2, 3)]
    return Calibration(
        search=parts[0], rerank=parts[1], fit=parts[2], source="random", hash="0" * 64
    )


def exact_kl(model, batch, gates):
    with torch.no_grad():
        p = F.log_softmax(forward(Pair.dense(model), batch, Gates.dense(6)), -1)
        q = F.log_softmax(forward(Pair.dense(model), batch, gates), -1)
    return (p.exp() * (p - q)).sum(-1).mean(1)


def test_the_teachers_kl_is_exact_when_it_keeps_all_but_one_token(model):
    batch = random_batch(model, rows=3)
    gates = Gates.removing(6, prefill={1}, decode={4})
    measured = Objective(model, batch).measure(
        Removal(num_layers=6, mode="projected", prefill=frozenset({1}), decode=frozenset({4}))
    )
    torch.testing.assert_close(measured.loss_n, exact_kl(model, batch, gates), atol=1e-5, rtol=1e-4)
    few = Teacher.of(model, batch, top=8)
    y = dense_trace(model, batch)[-1][1]
    assert few.kl(model, y).abs().max() < 1e-5
    with torch.no_grad():
        pruned = trimmed(Pair.dense(model), gates).streams(batch)[-1][1]
    assert (few.kl(model, pruned) <= measured.loss_n + 1e-6).all()
    assert few.kl(model, pruned).mean() > 0.1 * measured.loss


def test_prefix_reuse_changes_the_cost_and_not_the_loss(model):
    batch = random_batch(model)
    objective = Objective(model, batch)
    start = objective.measure(Removal(num_layers=6, mode="projected"))
    full = objective.spent
    objective.stand_on(start)
    late = start.state.remove("prefill", 4)
    spent = objective.spent
    resumed = objective.measure(late).loss
    assert objective.spent - spent < full / 4
    assert resumed == pytest.approx(Objective(model, batch).measure(late).loss, abs=1e-7)


def test_block_tokens_are_counted_by_hand(model):
    batch = random_batch(model, rows=2, prompt=9, new=6)  # 8 prefill and 6 decode tokens a row
    objective = Objective(model, batch)
    assert objective.spent == 2 * 6 * (8 + 6)  # the dense pass
    objective.measure(
        Removal(num_layers=6, mode="projected", prefill=frozenset({2}), decode=frozenset({2, 5}))
    )
    # prefill: block 2 off, block 5 unread; decode: 4 blocks
    assert objective.spent == 2 * 6 * 14 + 2 * (4 * 8 + 4 * 6)


def test_the_budget_is_never_passed(model):
    batch = random_batch(model)
    objective = Objective(model, batch, budget=1000)
    start = objective.measure(Removal(num_layers=6, mode="projected"))
    goal = Goal.blocks(6, decode=5)
    with pytest.raises(BudgetSpent):
        greedy(objective, start, goal)
    assert objective.spent <= 1000
    with pytest.raises(PlanError, match="budget of 1000"):
        PDTrim().plan(
            model,
            calibration_of(model),
            Target(repair="none", prefill_remove=3, decode_remove=2, budget=1000, search="greedy"),
        )
    annealed = anneal(objective, start, goal, Annealing(steps=5), rng=random.Random(0))
    assert annealed.state == start.state


def test_greedy_takes_the_best_block_at_each_step(model):
    batch = random_batch(model, rows=4)
    objective = Objective(model, batch)
    start = objective.measure(Removal(num_layers=6, mode="projected"))
    found = greedy(objective, start, Goal.blocks(6, decode=2))
    singles = {
        i: float(exact_kl(model, batch, Gates.removing(6, decode={i})).mean()) for i in range(6)
    }
    first = min(singles, key=singles.get)
    pairs = {
        i: float(exact_kl(model, batch, Gates.removing(6, decode={first, i})).mean())
        for i in range(6)
        if i != first
    }
    assert found.state.decode == {first, min(pairs, key=pairs.get)}
    lazy = greedy(objective, start, Goal.blocks(6, decode=2), shortlist=6)
    assert lazy.state == found.state


def test_a_thrifty_greedy_ends_where_a_plain_one_does_not(model):
    batch, goal = random_batch(model, rows=4), Goal.blocks(6, decode=3)
    free = Objective(model, batch)
    dense = Removal(num_layers=6, mode="projected")
    plain = greedy(free, free.measure(dense), goal)
    for budget in (free.spent, free.spent * 4 // 5):
        objective = Objective(model, batch, budget=budget)
        found = greedy(objective, objective.measure(dense), goal, thrifty=True)
        assert goal.met(found.state) and objective.spent <= budget
        if budget == free.spent:
            assert found.state == plain.state  # nothing is left out where all can be paid
        else:
            first = sorted(free.memo, key=free.memo.get)
            alone = [min(s.decode) for s in first if len(s.decode) == 1]
            tried = [s for s in objective.memo if len(s.decode) == 2]
            second = {min(s.decode - {alone[0]}) for s in tried}
            assert second == set(alone[1 : 1 + len(second)])  # those that looked best before
            assert 0 < len(second) < 5


@pytest.mark.parametrize("mode", ["projected", "subset"])
def test_one_shot_takes_the_blocks_that_cost_least_alone(model, mode):
    batch = random_batch(model, rows=4)
    objective = Objective(model, batch)
    start = objective.measure(Removal(num_layers=6, mode=mode))
    found = one_shot(objective, start, Goal.blocks(6, prefill=1, decode=3)).state
    alone = {
        i: float(exact_kl(model, batch, Gates.removing(6, decode={i})).mean()) for i in range(6)
    }
    assert found.decode == set(sorted(alone, key=alone.get)[:3])
    before = found.decode if mode == "subset" else frozenset()
    candidates = before or range(6)
    harm = {
        i: float(
            exact_kl(model, batch, Gates.removing(6, prefill={i}, decode=before, mode=mode)).mean()
        )
        for i in candidates
    }
    assert found.prefill == {min(harm, key=harm.get)}


def test_parts_of_the_text_add_up_to_the_whole(model):
    batch = random_batch(model, rows=8)
    state = Removal(num_layers=6, mode="projected", decode=frozenset({2}))
    whole = Objective(model, batch)
    measured = whole.measure(state)
    nested = Objective(model, batch)
    before = nested.spent
    for parts in nested.levels:
        loss_n = nested.score(state, parts)
        assert torch.equal(loss_n, measured.loss_n[: len(loss_n)])
        assert (state in nested.memo) == (parts == len(nested.batches))
    assert nested.levels == [1, 2, 4] and nested.memo == whole.memo
    assert nested.spent - before == whole.spent - before  # no part is charged twice
    nested.score(state, 2)
    assert nested.spent == whole.spent


@pytest.mark.parametrize("mode,prefill,decode", [("projected", 2, 1), ("subset", 1, 3)])
def test_the_default_method_finds_the_optimum_of_a_small_model(model, mode, prefill, decode):
    calibration = calibration_of(model)
    target = Target(repair="none", prefill_remove=prefill, decode_remove=decode, mode=mode)
    method = PDTrim(shortlist=None, annealing=Annealing(steps=250, hot=0.3), finalists=1)
    plan = method.plan(model, calibration, target).plan
    losses = {}
    for p in itertools.combinations(range(6), prefill):
        for d in itertools.combinations(range(6), decode):
            if mode == "projected" or set(p) <= set(d):
                gates = Gates.removing(6, prefill=p, decode=d, mode=mode)
                losses[gates] = float(exact_kl(model, calibration.search, gates).mean())
    best = min(losses.values())
    assert plan.provenance.search_kl == pytest.approx(best, rel=1e-3)
    assert float(exact_kl(model, calibration.search, plan.gates).mean()) == pytest.approx(
        best, rel=1e-3
    )
    assert plan.gates == plan.gates.without_dead_work()


def test_reranking_uses_text_the_search_has_not_seen(model):
    calibration = calibration_of(model)
    target = Target(repair="none", prefill_remove=0, decode_remove=2)
    method = PDTrim(shortlist=None, annealing=Annealing(steps=60), finalists=15)
    plan = method.plan(model, calibration, target).plan
    scores = {}
    for d in itertools.combinations(range(6), 2):
        gates = Gates.removing(6, decode=d)
        both = [
            exact_kl(model, part, gates).mean() for part in (calibration.search, calibration.rerank)
        ]
        scores[gates.without_dead_work()] = float(sum(both))
    assert plan.gates == min(scores, key=scores.get)


def test_swaps_keep_the_counts_and_the_subset_rule():
    rng = random.Random(0)
    for mode in ("projected", "subset"):
        state = Removal(
            num_layers=7, mode=mode, prefill=frozenset({1}), decode=frozenset({1, 4, 5})
        )
        goal = Goal.blocks(7, prefill=1, decode=3)
        seen = set()
        for _ in range(200):
            state = swap(state, goal, rng)
            assert (len(state.prefill), len(state.decode)) == (1, 3)
            state.gates  # raises where a rule is broken  # noqa: B018
            seen.add(state)
        assert len(seen) > 20
    whole = Removal(num_layers=3, mode="projected")
    assert swap(whole, Goal.blocks(3), rng) is None


def test_metropolis_accepts_by_temperature():
    rng = random.Random(0)
    assert accepts(1.0, 0.5, 1e-9, rng)
    cold = sum(accepts(1.0, 1.1, 0.01, rng) for _ in range(300))
    warm = sum(accepts(1.0, 1.1, 0.1, rng) for _ in range(300))
    assert cold < 5 and 60 < warm < 160  # e^-1 of 300 is 110


def test_a_plan_repeats_with_its_seed(model):
    calibration = calibration_of(model)
    target = Target(repair="none", prefill_remove=2, decode_remove=1, seed=3)
    digests = {PDTrim().plan(model, calibration, target).plan.digest for _ in range(2)}
    assert len(digests) == 1


def test_similarity_is_the_cosine_of_an_input_and_an_output():
    flows = [
        torch.tensor([[[1.0, 0.0]]]),
        torch.tensor([[[1.0, 1.0]]]),
        torch.tensor([[[0.0, 2.0]]]),
    ]
    trace = [(flow, 3 * flow) for flow in flows]
    for stage in ("prefill", "decode"):
        torch.testing.assert_close(similarity([trace], stage), torch.full((2,), 0.5**0.5))
        two = similarity([trace], stage, span=2)
        torch.testing.assert_close(two, torch.zeros(2))


def test_paper_keeps_prefills_set_inside_decodes_and_optimises_the_cosine(model):
    calibration = calibration_of(model)
    target = Target(
        repair="none",
        prefill_remove=1,
        decode_remove=2,
        mode="subset",
        kv=parse_policy("first_last:first=1,last=2,layers=2"),
    )
    plan = (
        Paper(spread=3.0, annealing=Annealing(steps=80, hot=0.3))
        .plan(model, calibration, target)
        .plan
    )
    gates = plan.gates
    gone = {
        s: {i for i, a in enumerate(gates.of(s)[0]) if a in (False, "off")}
        for s in ("prefill", "decode")
    }
    assert (len(gone["prefill"]), len(gone["decode"])) == (1, 2)
    assert gone["prefill"] < gone["decode"]
    assert sum(rule.selector.name == "first_last" for rule in plan.kv) == 2
    objective = Objective(model, calibration.search, loss=cosine_loss)
    losses = {
        d: objective.measure(Removal(num_layers=6, mode="subset", decode=frozenset(d))).loss
        for d in itertools.combinations(range(6), 2)
    }
    assert gone["decode"] == set(min(losses, key=losses.get))


@pytest.mark.parametrize(
    "target,words",
    [
        (Target(repair="none", prefill_remove=6, decode_remove=0), "cannot remove 6 of 6"),
        (Target(repair="none", prefill_remove=-1, decode_remove=0), "cannot remove -1"),
        (
            Target(repair="none", prefill_remove=2, decode_remove=1, mode="subset"),
            "cannot lose 2 when",
        ),
    ],
)
def test_targets_that_no_plan_meets(model, target, words):
    with pytest.raises(PlanError, match=words):
        PDTrim().plan(model, calibration_of(model), target)


def test_paper_refuses_the_mode_it_does_not_know(model):
    with pytest.raises(PlanError, match="use mode subset"):
        Paper().plan(
            model, calibration_of(model), Target(repair="none", prefill_remove=1, decode_remove=1)
        )
