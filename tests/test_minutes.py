"""A search is held to its minutes, says how long it takes, and drops early what cannot win."""

import random
from dataclasses import replace

import pytest

from helpers import random_batch, tiny_model, trimmed
from pdtrim.calibration.batches import Calibration
from pdtrim.errors import PlanError
from pdtrim.keep.journal import Journal
from pdtrim.methods import Paper, PDTrim, Target
from pdtrim.plan import Gates
from pdtrim.repair.apply import best_repair
from pdtrim.search.goal import Goal
from pdtrim.search.greedy import greedy
from pdtrim.search.hybrid import Hybrid, hybrid
from pdtrim.search.objective import Objective
from pdtrim.search.state import Removal


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", layers=6)


def text_of(model, rows=8):
    parts = [random_batch(model, rows=rows, prompt=10, new=6, seed=s) for s in (1, 2, 3)]
    return Calibration(
        search=parts[0], rerank=parts[1], fit=parts[2], source="random", hash="0" * 64
    )


def searched(model, journal, late):
    objective = Objective(model, text_of(model).search, journal=journal)
    objective.late = late
    start = objective.measure(Removal(num_layers=6, mode="projected"))
    goal = Goal.blocks(6, prefill=2, decode=1)
    found = hybrid(objective, start, goal, Hybrid(), rng=random.Random(0))
    assert goal.met(found.state)
    return found.state, objective.spent


def test_what_is_late_ends_with_the_best_so_far_and_resumes_to_the_same(model, tmp_path):
    calls = iter(range(1000))
    path = tmp_path / "j.jsonl"
    whole = searched(model, None, lambda: False)
    cut = searched(model, Journal(path, {}), lambda: next(calls) > 4)
    assert cut[1] < whole[1]
    greedy_only = searched(model, None, lambda: True)
    assert greedy_only[1] < cut[1]
    # resumed, it ends where it ended, however fast the replay is
    assert searched(model, Journal(path, {}), lambda: False) == cut


def test_a_plan_says_how_long_and_keeps_to_its_minutes(model):
    said = []
    target = Target(prefill_remove=2, minutes=5)
    made = PDTrim().plan(model, text_of(model), target, say=said.append).plan
    assert len(said) == 1 and "search" in said[0] and "repairs" in said[0]
    assert sum(made.gates.prefill_mlp) == 4
    with pytest.raises(PlanError, match="minutes"):
        tiny = Target(prefill_remove=2, minutes=1e-6)
        PDTrim().plan(model, text_of(model), tiny)
    with pytest.raises(PlanError, match="'paper' cannot be held to minutes"):
        Paper().plan(model, text_of(model), replace(target, mode="subset", decode_remove=2))


def test_repairs_stop_when_there_is_no_time(model):
    text = text_of(model)
    pair = trimmed(model, Gates.removing(6, prefill={2, 4}))
    left = iter([False, False, True])
    few = best_repair(model, pair, text.fit, text.rerank, over=lambda: next(left, True))
    assert list(few.tried["prefill"]) == ["none", "scalar", "diagonal"]
    assert few.score.loss == min(few.tried["prefill"].values())


def test_halving_measures_few_candidates_on_the_whole_text(model):
    text = text_of(model).search
    goal = Goal.blocks(6, decode=2)
    spent, sets = {}, {}
    for halving in (False, True):
        objective = Objective(model, text)
        start = objective.measure(Removal(num_layers=6, mode="projected"))
        found = greedy(objective, start, goal, halving=halving)
        spent[halving], sets[halving] = objective.spent, found.state
        whole = [s for s in objective.memo if len(s.decode) == 1]
        assert len(whole) == (3 if halving else 6)
    assert spent[True] < 0.9 * spent[False] and goal.met(sets[True])
