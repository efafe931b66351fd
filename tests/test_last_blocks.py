"""Prefill's last blocks, tried beside the finalists of the search when all are repaired."""

from dataclasses import replace

import pytest

from helpers import random_text, tiny_model
from pdtrim.methods import PDTrim, Target
from pdtrim.methods import pdtrim as module
from pdtrim.methods.pdtrim import without_last
from pdtrim.plan import Gates
from pdtrim.repair.apply import best_repair
from pdtrim.search.goal import Goal
from pdtrim.search.state import Removal

L = 5


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", layers=L, vocab_size=300)


@pytest.fixture(scope="module")
def text(model):
    return random_text(model, prompt=24, new=12)


def best_of(monkeypatch, model, text, found, wins):
    """The plan of a search that finds a state, where the repair of the gates that win is the best;
    and what was repaired."""
    seen = []

    def judged(model, trimmed, fit, judge, kinds, *, over):
        made = best_repair(model, trimmed, fit, judge, kinds, over=over)
        seen.append((trimmed.gates, tuple(kinds["prefill"])))
        return replace(made, score=replace(made.score, kl=0.0 if wins(trimmed.gates) else 1.0))

    monkeypatch.setattr(module, "best_repair", judged)
    monkeypatch.setattr(PDTrim, "explore", lambda self, problem, one, goal: one.measure(found))
    target = Target(prefill_remove=2, decode_remove=len(found.decode))
    return PDTrim().plan(model, text, target).plan.gates, seen


def test_they_win_where_their_repair_is_the_best(monkeypatch, model, text):
    found = Removal(num_layers=L, mode="projected", prefill=frozenset({0, 2}))
    own, last = (g.without_dead_work() for g in (found.gates, Gates.removing(L, prefill={3, 4})))
    for winner in (last, own):
        gates, seen = best_of(monkeypatch, model, text, found, winner.__eq__)
        assert gates == winner and [one for one, _ in seen] == [own, last]
    kinds = dict(seen)[last]
    assert "kv" in kinds and "outputs+kv" in kinds, "what won for another pair is not enough"


def test_decode_stays_as_it_was_found(monkeypatch, model, text):
    sets = {"prefill": frozenset({0, 2}), "decode": frozenset({1})}
    found = Removal(num_layers=L, mode="projected", **sets)
    gates, _ = best_of(monkeypatch, model, text, found, lambda gates: gates.prefill_mlp[0])
    assert gates == Gates.removing(L, prefill={3, 4}, decode={1}).without_dead_work()


@pytest.mark.parametrize("grain", ["block", "part"])
def test_as_many_last_units_go_as_the_goal_asks_for(grain):
    units = L if grain == "block" else 2 * L
    best = Removal(num_layers=L, mode="projected", grain=grain, prefill=frozenset({0, 2}))
    goal = Goal.blocks(L, prefill=2, grain=grain, attention=0.25)
    made = without_last(best, goal)
    gone = sorted(made.prefill)
    assert gone == list(range(gone[0], units)) and goal.met(made)
    assert not goal.met(made.restore("prefill", gone[0]))
    assert without_last(replace(best, prefill=frozenset()), goal) is None
    for mode in ("unified", "subset"):
        both = replace(best, mode=mode, decode=best.prefill)
        assert without_last(both, goal) is None
