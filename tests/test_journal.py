"""The journal: a killed search goes on where it was, and ends as if it had never stopped."""

import json

import pytest

import pdtrim.search.objective as objective_module
from helpers import random_batch, tiny_model
from pdtrim.calibration.batches import Calibration
from pdtrim.errors import PdtrimError, PlanError
from pdtrim.keep.journal import Journal
from pdtrim.methods import Paper, PDTrim, Target
from pdtrim.methods.problem import Problem
from pdtrim.search.anneal import Annealing
from pdtrim.search.objective import Objective
from pdtrim.search.state import Removal

SEARCHES = ["one_shot", "greedy", "anneal", "evolution", "hybrid"]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", layers=6)


def calibration_of(model, rows=4):
    parts = [random_batch(model, rows=rows, prompt=8, new=4, seed=s) for s in (1, 2, 3)]
    return Calibration(
        search=parts[0], rerank=parts[1], fit=parts[2], source="random", hash="0" * 64
    )


class Killed(Exception):
    pass


class Meter:
    """Counts the forwards of an objective's evaluations and, if told to, dies at one."""

    def __init__(self, monkeypatch):
        self.losses, self.deadly = 0, None
        real = objective_module.kl_loss

        def maker(model, batch):
            loss = real(model, batch)

            def counted(y):
                if self.losses == self.deadly:
                    raise Killed
                self.losses += 1
                return loss(y)

            return counted

        monkeypatch.setitem(Problem.objective.__kwdefaults__, "loss", maker)

    def count(self, run):
        before = self.losses
        return run(), self.losses - before


def plan_of(model, search, journal=None):
    method = PDTrim(annealing=Annealing(steps=8), finalists=2)
    target = Target(repair="none", prefill_remove=1, decode_remove=2, search=search)
    made = method.plan(model, calibration_of(model), target, journal=journal).plan
    return made.digest, made.provenance.search_block_tokens, made.provenance.search_kl


@pytest.mark.parametrize("search", SEARCHES)
def test_a_killed_search_goes_on_where_it_was(model, search, tmp_path, monkeypatch):
    meter = Meter(monkeypatch)
    whole, total = meter.count(lambda: plan_of(model, search))
    for share in (0.2, 0.8):
        path = tmp_path / f"{share}.jsonl"
        meter.deadly = meter.losses + round(share * total)
        with pytest.raises(Killed):
            plan_of(model, search, path)
        meter.deadly = None
        done = sum(
            entry["parts"][1] - entry["parts"][0]
            for entry in map(json.loads, path.read_text().splitlines()[1:])
            if "parts" in entry
        )
        assert round(share * total) - 4 < done <= round(share * total)  # lost: one evaluation
        resumed, new = meter.count(lambda path=path: plan_of(model, search, path))
        assert resumed == whole
        assert new == total - done
    again, new = meter.count(lambda: plan_of(model, search, path))
    assert again == whole and new == 0


def test_streams_are_made_again_only_if_the_search_stands_on_them(model, tmp_path, monkeypatch):
    batch = random_batch(model)
    dense = Removal(num_layers=6, mode="projected")
    changed = dense.remove("decode", 4)

    def run(last):
        objective = Objective(model, batch, journal=Journal(tmp_path / "j", {"search": "x"}))
        objective.stand_on(objective.measure(dense))
        measured = [objective.measure(state) for state in (changed, last)]
        return objective.spent, [m.loss_n.tolist() for m in measured]

    run(changed)
    runs = []
    real = Objective._run
    monkeypatch.setattr(
        Objective, "_run", lambda self, *args: runs.append(args) or real(self, *args)
    )
    first = run(changed)
    assert runs == []
    lines = (tmp_path / "j").read_text().splitlines(keepends=True)
    (tmp_path / "j").write_text("".join(lines[:-1]))
    assert run(changed) == first
    assert len(runs) == 2  # the last evaluation, and once the streams it starts from


def test_a_torn_last_line_is_dropped(tmp_path):
    path = tmp_path / "deep" / "journal"
    journal = Journal(path, {"search": "a"})
    numbers = [0.1, 1e-9, 3.0]
    for key in range(3):
        assert journal.once({"key": key}, lambda: numbers) == numbers
    path.write_bytes(path.read_bytes()[:-5])
    journal = Journal(path, {"search": "a"})
    calls = []
    for key in range(4):
        assert journal.once({"key": key}, lambda: calls.append(1) or numbers) == numbers
    assert len(calls) == 2
    assert [json.loads(x).get("key") for x in path.read_text().splitlines()] == [None, 0, 1, 2, 3]


def test_a_journal_torn_in_its_header_begins_anew(tmp_path):
    path = tmp_path / "journal"
    Journal(path, {"search": "a"})
    path.write_bytes(path.read_bytes()[:7])
    assert Journal(path, {"search": "b"}).once({"key": 0}, lambda: [1.0]) == [1.0]
    assert len(path.read_text().splitlines()) == 2


def test_other_searches_and_other_files_are_refused(model, tmp_path):
    path = tmp_path / "journal"
    plan_of(model, "greedy", path)
    before = path.read_bytes()
    with pytest.raises(PdtrimError, match=r'with target\.search "greedy", now it is "hybrid"'):
        plan_of(model, "hybrid", path)
    with pytest.raises(PdtrimError, match=r"was made with model \w{12}\.\.\., now it is"):
        plan_of(tiny_model("llama", layers=6, seed=1), "greedy", path)
    with pytest.raises(PdtrimError, match="was made with method"):
        Paper().plan(
            model,
            calibration_of(model),
            Target(repair="none", mode="subset", decode_remove=1),
            journal=path,
        )
    assert path.read_bytes() == before
    text = tmp_path / "text"
    text.write_text("not a journal\n")
    with pytest.raises(PlanError, match="no journal"):
        Journal(text, {"search": "a"})
    journal = Journal(tmp_path / "other", {"search": "a"})
    journal.once({"key": 1}, lambda: [0.5])
    with pytest.raises(PlanError, match="asks for"):
        Journal(tmp_path / "other", {"search": "a"}).once({"key": 2}, lambda: [0.5])


def test_measured_times_are_replayed(model, tmp_path, monkeypatch):
    target = Target(repair="none", metric="latency", decode_share=0.3, search="greedy")

    def run():
        text = calibration_of(model)
        return PDTrim().plan(model, text, target, journal=tmp_path / "journal").plan

    first = run()

    def fail(*args, **kwargs):
        raise AssertionError("timed again")

    monkeypatch.setattr("pdtrim.methods.problem.measure_latency", fail)
    assert run().digest == first.digest
