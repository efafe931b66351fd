"""The numbers of a comparison: averages over tasks, paired differences, bytes and times."""

import sys

import numpy as np
import pytest

from helpers import make_plan, perturbed, random_batch, tiny_model
from pdtrim.bench.stages import stage_times
from pdtrim.bundle import TrimPlan
from pdtrim.errors import PdtrimError
from pdtrim.evaluate.compare.measure import MeasuredRun
from pdtrim.evaluate.compare.records import PairFacts, Run
from pdtrim.evaluate.compare.summary import summarise, task_infos
from pdtrim.evaluate.compare.systems import System
from pdtrim.evaluate.handover import loopback_bytes
from pdtrim.evaluate.statistics import average_interval, paired_average
from pdtrim.evaluate.tasks.scores import TaskScores
from pdtrim.kv.codecs import Entropy
from pdtrim.plan import Gates, LayerKV
from pdtrim.stage.forward import Pair, Trimmed


def scores_of(task="piqa", values=(0.0, 1.0), *, main="acc", ppl=20.0, items="h"):
    return TaskScores(
        task=task,
        version="1",
        source="folder",
        shots=0,
        count=len(values),
        metrics={main: ppl if main == "ppl" else sum(values) / len(values)},
        items={main: tuple(values)},
        items_hash=items,
        main=main,
    )


def facts(removed, kv_bytes=100.0):
    return PairFacts(prefill_removed=removed, decode_removed=removed, kv_bytes=kv_bytes)


# the statistics


def test_an_average_counts_tasks_alike_and_resamples_within_each():
    short, long = [0.0, 1.0], [1.0] * 100
    interval = average_interval([short, long], seed=0)
    # the short task's resampled mean is 0, 1/2 or 1; the long one's is always 1
    assert (interval.mean, interval.low, interval.high) == (0.75, 0.5, 1.0)
    with pytest.raises(PdtrimError, match="at least one task"):
        average_interval([], seed=0)


def test_a_paired_average_sees_what_pairing_cancels():
    rng = np.random.default_rng(0)
    tasks = [rng.normal(size=40), rng.normal(size=60)]
    shifted = [a_n + 0.1 for a_n in tasks]
    interval = paired_average(shifted, tasks, seed=0)
    assert interval.mean == pytest.approx(0.1)
    assert interval.high - interval.low < 1e-9
    unpaired = [rng.permutation(a_n) for a_n in tasks]
    wide = paired_average(shifted, unpaired, seed=0)
    assert wide.high - wide.low > 0.2
    with pytest.raises(PdtrimError, match="same tasks"):
        paired_average(tasks, tasks[:1], seed=0)
    with pytest.raises(PdtrimError, match="same items"):
        paired_average(tasks, tasks[::-1], seed=0)


def test_a_paired_average_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    covered = 0
    for case in range(150):
        b = [rng.normal(size=30), rng.normal(scale=2, size=50)]
        a = [b_n + rng.normal(0.2, 0.5, size=len(b_n)) for b_n in b]
        interval = paired_average(a, b, seed=case, samples=500)
        covered += interval.low <= 0.2 <= interval.high
    assert 0.88 <= covered / 150 <= 0.99


def measured(*per_seed, ppl=None, kv_bytes=100.0, failed=0):
    """Runs of one system: a dict of task to item scores for each seed."""
    runs = []
    for seed, tasks in enumerate(per_seed):
        scores = {task: scores_of(task, values) for task, values in tasks.items()}
        if ppl is not None:
            scores["wikitext"] = scores_of("wikitext", (1.0, 2.0), main="ppl", ppl=ppl[seed])
        run = Run(
            seed=seed,
            facts=facts(0.2, kv_bytes),
            scores={t: s.metrics[s.main] for t, s in scores.items()},
        )
        runs.append(MeasuredRun(run=run, scores=scores))
    failures = [Run(seed=len(runs) + i, failed="it refuses") for i in range(failed)]
    return runs + [MeasuredRun(run=run, scores={}) for run in failures]


def system(name, method=None, **changes):
    return System(
        name=name,
        method=method or name,
        setting="unified",
        mode="unified",
        prefill_share=0.2,
        decode_share=0.2,
        **changes,
    )


def test_seeds_are_averaged_item_by_item_and_their_spread_is_told():
    rows, best = summarise(
        [system("sleb")],
        {
            "dense": measured({"piqa": (1, 1, 1, 1), "cb": (1, 1)}, ppl=[10.0]),
            "sleb": measured(
                {"piqa": (1, 0, 0, 0), "cb": (0, 1)},
                {"piqa": (1, 1, 1, 0), "cb": (1, 1)},
                ppl=[20.0, 30.0],
                kv_bytes=50.0,
                failed=1,
            ),
        },
    )
    dense, row = rows
    assert best == "sleb"
    assert row.scores == {"piqa": 0.5, "cb": 0.75}
    assert row.ppl == {"wikitext": 25.0}
    assert row.average.mean == row.of_dense == 0.625
    assert row.spread == (0.375, 0.875)  # (1/4 + 1/2) / 2 and (3/4 + 1) / 2
    assert [run.average for run in row.runs] == [0.375, 0.875, None]
    assert (row.to_dense.mean, row.to_baseline) == (-0.375, None)
    assert row.kv_compression == 2 and row.failed is None
    assert (dense.average.mean, dense.of_dense, dense.kv_compression) == (1, None, 1)


def test_the_best_baseline_is_an_untrained_one_of_the_literature():
    right = {"piqa": (1, 1, 1, 0)}
    found = {
        "dense": measured({"piqa": (1, 1, 1, 1)}),
        "pdtrim": measured({"piqa": (1, 1, 1, 1)}),
        "paper": measured({"piqa": (1, 1, 1, 1)}),
        "sleb+pdtrim": measured({"piqa": (1, 1, 1, 1)}),
        "given": measured({"piqa": (1, 1, 1, 1)}),
        "sleb": measured({"piqa": (1, 0, 0, 0)}),
        "flap": measured(right),
        "broken": measured(failed=1),
    }
    systems = [system(name) for name in list(found)[1:]]
    systems[3] = system("given", "flap", given={0: "plan.json"})
    rows, best = summarise(systems, found)
    assert best == "flap"
    by_name = {row.name: row for row in rows}
    assert by_name["sleb"].to_baseline.mean == -0.5
    assert by_name["pdtrim"].to_baseline.mean == 0.25
    assert by_name["broken"].failed == "it refuses" and by_name["broken"].to_baseline is None


def test_perplexities_alone_have_no_average():
    rows, best = summarise(
        [system("sleb")],
        {"dense": measured({}, ppl=[10.0]), "sleb": measured({}, ppl=[20.0])},
    )
    assert best is None and rows[1].average is None and rows[1].ppl == {"wikitext": 20.0}


def test_systems_with_other_items_do_not_meet():
    dense = measured({"piqa": (1, 1)})
    other = [MeasuredRun(run=dense[0].run, scores={"piqa": scores_of(values=(1, 1), items="x")})]
    assert task_infos({"dense": dense, "sleb": dense})[0].task == "piqa"
    with pytest.raises(PdtrimError, match="'sleb' and 'dense' were not given the same piqa"):
        task_infos({"dense": dense, "sleb": other})


# bytes and times


def test_bytes_are_those_of_what_prefill_runs():
    model = tiny_model()
    batch = random_batch(model, prompt=40)
    other = {"prefill": {2: perturbed(model, 2)}}

    def sent(kv, blocks=None):
        plan = make_plan(model, Gates.removing(4, prefill={1}, decode={1}), (kv,) * 4)
        prefill = TrimPlan.of(plan, blocks or {}).pair(model).prefill
        return loopback_bytes(plan, prefill, batch).frame

    whole, coded = LayerKV(), LayerKV(codec=Entropy())
    raw = 3 * 2 * 39 * 2 * 8 * 4  # layers, K and V, tokens, heads, width, bytes
    assert raw < sent(whole, other) == sent(whole) < raw + 500
    assert sent(coded, other) != sent(coded)


def test_a_pair_that_runs_less_is_timed_beside_the_dense_one(monkeypatch):
    model = tiny_model()
    clock = iter(range(1000))
    work = {"blocks": 0}

    def perf_counter():
        return next(clock) + work["blocks"]

    monkeypatch.setattr("pdtrim.clock.time.perf_counter", perf_counter)
    # a block's forward advances the clock, and nothing else does but reading it
    for stage in ("prefill", "decode"):
        name = f"pdtrim.stage.generate.{stage}_block"
        real = getattr(sys.modules["pdtrim.stage.generate"], f"{stage}_block")

        def counted(*args, real=real, **kwargs):
            work["blocks"] += 100 * (kwargs["mlp"] or kwargs["attention"] not in (False, "off"))
            return real(*args, **kwargs)

        monkeypatch.setattr(name, counted)
    gates = Gates.removing(4, prefill={1}, decode={0, 1, 2})
    small = Trimmed(pair=Pair.dense(model), gates=gates, policy=Trimmed.dense(model).policy)
    times = stage_times(small, Trimmed.dense(model), prompt=9, new_tokens=3, repeats=2)
    assert times.decode == pytest.approx(1 / 4, abs=0.01)
    assert times.prefill == pytest.approx(3 / 4, abs=0.01)
    assert times.dense_decode_s == pytest.approx(3 * 4 * 100, abs=2)
    same = stage_times(Trimmed.dense(model), Trimmed.dense(model), prompt=9, repeats=1)
    assert (same.prefill, same.decode) == (1, 1)
    with pytest.raises(PdtrimError, match="a prompt of 2 tokens"):
        stage_times(small, small, prompt=1)
