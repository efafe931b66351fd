"""Hybrid and evolutionary search, against enumeration and against greedy at the same budget."""

import itertools
import random

import pytest
import torch

from helpers import random_batch, tiny_model
from pdtrim.search.anneal import Annealing
from pdtrim.search.evolution import Evolution, best_of, evolution, mutate
from pdtrim.search.goal import Goal
from pdtrim.search.greedy import greedy
from pdtrim.search.hybrid import Hybrid, clearly_worse, hybrid, race
from pdtrim.search.objective import Objective
from pdtrim.search.pairs import Surrogate, measure_pairs
from pdtrim.search.state import Removal


def dense_of(model, mode="projected", grain="block"):
    return Removal(num_layers=model.num_layers, mode=mode, grain=grain)


def run_hybrid(model, batch, goal, *, budget=None, seed=0, mode="projected", config=None):
    objective = Objective(model, batch, budget=budget)
    start = objective.measure(dense_of(model, mode))
    found = hybrid(objective, start, goal, config or Hybrid(), rng=random.Random(seed))
    return found, objective


def enumerate_decode(model, batch, count, monkeypatch):
    monkeypatch.setattr("pdtrim.search.objective.PARTS", 1)  # as fast as can be
    objective = Objective(model, batch)
    monkeypatch.undo()
    dense = objective.measure(dense_of(model))
    objective.stand_on(dense)
    removals = [
        Removal(num_layers=model.num_layers, mode="projected", decode=frozenset(units))
        for units in itertools.combinations(range(model.num_layers), count)
    ]
    return {state: objective.measure(state).loss for state in removals}, objective.spent


@pytest.fixture(scope="module")
def toy():
    """12 random blocks, where greedy does not find the best four to remove."""
    model = tiny_model("qwen3", layers=12, seed=1)
    batch = random_batch(model, rows=4, prompt=10, new=6, seed=1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        losses, spent = enumerate_decode(model, batch, 4, monkeypatch)
    return model, batch, losses, spent


def test_hybrid_finds_the_optimum_where_greedy_does_not(toy):
    model, batch, losses, enumeration = toy
    assert len(losses) == 495
    goal = Goal.blocks(12, decode=4)
    objective = Objective(model, batch)
    seed = greedy(objective, objective.measure(dense_of(model)), goal)
    best = min(losses.values())
    assert seed.loss > best * 1.02
    budget = enumeration // 6
    for number in range(2):
        found, objective = run_hybrid(model, batch, goal, budget=budget, seed=number)
        assert found.loss == pytest.approx(best, rel=1e-5)
        assert objective.spent <= budget


def test_the_surrogate_ranks_what_it_has_not_seen(toy):
    model, batch, losses, _ = toy
    objective = Objective(model, batch)
    objective.measure(dense_of(model))
    measure_pairs(objective, dense_of(model), Goal.blocks(12, decode=4), "decode")
    table = {s: float(n.mean()) for s, n in objective.known.items() if s.decode}
    assert len(table) == 12 + 12 * 11 // 2
    predicted = torch.tensor(Surrogate.fit(table).predict(list(losses)))
    true = torch.tensor(list(losses.values()))
    ranks = torch.stack([x.argsort().argsort().double() for x in (predicted, true)])
    assert torch.corrcoef(ranks)[0, 1] > 0.45  # the table is of one sequence of four
    single = {s: loss for s, loss in table.items() if len(s.decode) == 1}
    poor = torch.tensor(Surrogate.fit(single).predict(list(losses)))
    poor_ranks = torch.stack([poor.argsort().argsort().double(), ranks[1]])
    assert torch.corrcoef(ranks)[0, 1] > torch.corrcoef(poor_ranks)[0, 1] + 0.05


def test_the_surrogate_is_exact_where_losses_are_single_and_pair_terms():
    rng = random.Random(0)
    single = [rng.random() for _ in range(8)]
    pair = {p: rng.random() for p in itertools.combinations(range(8), 2)}

    def loss(units):
        return sum(single[u] for u in units) + sum(
            pair[p] for p in itertools.combinations(sorted(units), 2)
        )

    states = {
        units: Removal(
            num_layers=4,
            mode="projected",
            decode=frozenset(u for u in units if u < 4),
            prefill=frozenset(u - 4 for u in units if u >= 4),
        )
        for count in (1, 2, 4)
        for units in itertools.combinations(range(8), count)
    }
    surrogate = Surrogate.fit({states[u]: loss(u) for u in states if len(u) < 3}, ridge=1e-6)
    unseen = [units for units in states if len(units) == 4]
    for units, value in zip(unseen, surrogate.predict([states[u] for u in unseen]), strict=True):
        assert value == pytest.approx(loss(units), rel=0.001)


@pytest.mark.parametrize("mode", ["projected", "subset"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_hybrid_is_never_worse_than_greedy_at_its_budget(family, mode):
    goal = Goal.blocks(7, prefill=2, decode=3)
    for number in range(2):
        model = tiny_model(family, layers=7, seed=number)
        batch = random_batch(model, rows=4, prompt=8, new=4, seed=number)
        objective = Objective(model, batch)
        seed = greedy(objective, objective.measure(dense_of(model, mode)), goal)
        for factor in (1, 2):
            budget = factor * objective.spent
            found, meter = run_hybrid(model, batch, goal, budget=budget, seed=number, mode=mode)
            assert goal.met(found.state) and meter.spent <= budget
            assert found.loss <= seed.loss


def test_hybrid_makes_do_with_less_than_greedy_needs(toy):
    model, batch, _, _ = toy
    goal = Goal.blocks(12, decode=4)
    objective = Objective(model, batch)
    greedy(objective, objective.measure(dense_of(model)), goal)
    found, meter = run_hybrid(model, batch, goal, budget=objective.spent * 2 // 3)
    assert goal.met(found.state) and meter.spent <= objective.spent * 2 // 3


def test_without_a_budget_hybrid_spends_its_own_effort(toy):
    model, batch, _, _ = toy
    goal = Goal.blocks(12, decode=2)
    seeded = Objective(model, batch)
    greedy(seeded, seeded.measure(dense_of(model)), goal)
    config = Hybrid(annealing=Annealing(steps=12))
    found, objective = run_hybrid(model, batch, goal, config=config)
    allowance = config.annealing.steps * 2 / 3 * objective.dense_cost
    assert 0.5 * allowance < objective.spent - seeded.spent <= allowance
    again, _ = run_hybrid(model, batch, goal, config=config)
    assert again.state == found.state


def test_racing_drops_only_what_is_clearly_worse():
    noise = torch.tensor([1.0, -1.0, 0.5, -0.5])
    assert clearly_worse(noise + 3) and not clearly_worse(noise + 0.5)
    assert not clearly_worse(noise - 3) and not clearly_worse(torch.tensor([5.0, 5.0]))
    model = tiny_model("llama", layers=8, seed=4)
    objective = Objective(model, random_batch(model, rows=16, seed=4))
    objective.stand_on(objective.measure(dense_of(model)))
    states = [
        Removal(num_layers=8, mode="projected", decode=frozenset(pair))
        for pair in itertools.combinations(range(8), 2)
    ]
    leader = states[0]
    whole = Objective(model, random_batch(model, rows=16, seed=4))
    losses = {state: whole.measure(state).loss_n for state in states}
    leader = min(states, key=lambda state: float(losses[state].mean()))
    objective.measure(leader)
    kept = race(objective, leader, [state for state in states if state != leader])
    dropped = set(states) - {leader, *kept}
    assert dropped and kept
    early = [state for state in dropped if state not in objective.memo]
    assert early  # those cost less than the whole text
    for state in dropped:
        seen = len(objective.known[state])
        assert clearly_worse(losses[state][:seen] - losses[leader][:seen])
    for state in kept:
        assert not clearly_worse(losses[state] - losses[leader])
    assert [objective.memo[s] for s in kept] == sorted(objective.memo[s] for s in kept)


def test_evolution_repeats_with_its_seed_and_keeps_to_its_budget(toy):
    model, batch, losses, enumeration = toy
    goal = Goal.blocks(12, decode=4)
    results = []
    for seed in (0, 0, 1):
        objective = Objective(model, batch, budget=enumeration // 12)
        start = objective.measure(dense_of(model))
        found = evolution(objective, start, goal, Evolution(), rng=random.Random(seed))
        assert objective.spent <= enumeration // 12
        assert found.loss == min(f for s, f in objective.memo.items() if goal.met(s))
        assert found.loss == pytest.approx(losses[found.state], rel=1e-4)
        results.append((found.state, objective.spent, tuple(objective.known)))
    assert results[0] == results[1] != results[2]
    assert sum(loss < losses[results[0][0]] for loss in losses.values()) < 25  # of 495


def test_selection_measures_few_on_the_whole_text():
    model = tiny_model("llama", layers=8, seed=2)
    goal = Goal.blocks(8, decode=2)
    objective = Objective(model, random_batch(model, rows=8))
    objective.stand_on(objective.measure(dense_of(model)))
    base = Removal(num_layers=8, mode="projected", decode=frozenset({1, 5}))
    rng = random.Random(0)
    states = list({mutate(base, goal, rng): None for _ in range(24)})
    distances = {len(base.decode ^ state.decode) for state in states}
    assert distances <= {0, 2, 4} and all(goal.met(state) for state in states)
    winner = best_of(objective, states, 0.25)
    complete = [state for state in states if state in objective.memo]
    assert len(complete) <= 2 < len(states) and winner in complete
    first = {s: float(objective.known[s][: len(objective.batches[0])].mean()) for s in states}
    assert set(complete) <= set(sorted(first, key=first.get)[: round(len(states) / 4)])
