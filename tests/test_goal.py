"""Grains and goals: legal gates, real savings, and searches that stop when they are met."""

import random
from dataclasses import replace

import pytest
import torch

from baselines_naive import ALL, flatten
from helpers import make_plan, random_batch, tiny_config, tiny_model
from pdtrim.calibration.batches import Calibration
from pdtrim.errors import PlanError
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.kv.selectors import SnapKV
from pdtrim.methods import Paper, PDTrim, Target
from pdtrim.methods.baselines import UIDL
from pdtrim.methods.problem import Problem
from pdtrim.plan import STAGES, Gates, LayerKV
from pdtrim.progress import silent
from pdtrim.search.anneal import Annealing, random_state, swap
from pdtrim.search.goal import Goal, attention_share
from pdtrim.search.greedy import greedy
from pdtrim.search.latency import measure_latency
from pdtrim.search.objective import Objective, first_difference
from pdtrim.search.one_shot import one_shot
from pdtrim.search.state import Removal
from pdtrim.stage.cost import Lengths, removed_parameters, stage_flops

LENGTHS = Lengths(prompt=40, continuation=20)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", layers=6)


def calibration_of(model, rows=4):
    parts = [random_batch(model, rows=rows, prompt=10, new=6, seed=s) for s in (1, 2, 3)]
    return Calibration(
        search=parts[0], rerank=parts[1], fit=parts[2], source="random", hash="0" * 64
    )


def goals_of(model, grain, mode):
    sizes = [100.0 * (1 + layer % 3) for layer in range(6)]
    units = range(6 if grain == "block" else 12)
    seconds = {stage: [1.0 + (7 * u) % 5 for u in units] for stage in STAGES}
    shares = {"prefill_share": 0.2, "decode_share": 0.4, "grain": grain, "mode": mode}
    return {
        "blocks": Goal.blocks(6, prefill=1, decode=2, grain=grain, attention=0.4),
        "parameters": Goal.parameters(model, **shares),
        "flops": Goal.flops(model.config, LENGTHS, **shares),
        "kv_bytes": Goal.kv_bytes(sizes, share=0.4, grain=grain),
        "latency": Goal.latency(seconds, prefill_share=0.2, decode_share=0.4),
    }


def assert_minimal(goal, state):
    assert goal.met(state)
    for stage in STAGES:
        for unit in state.restorable(stage):
            assert not goal.met(state.restore(stage, unit)), (stage, unit)


@pytest.mark.parametrize("mode", ["projected", "subset"])
def test_parts_make_legal_gates_of_what_was_removed(mode):
    rng = random.Random(0)
    for _ in range(300):
        state = Removal(num_layers=5, mode=mode, grain="part")
        for _ in range(rng.randrange(14)):
            stage = rng.choice(STAGES)
            if rng.random() < 0.7 and state.removable(stage):
                state = state.remove(stage, rng.choice(state.removable(stage)))
            elif state.restorable(stage):
                state = state.restore(stage, rng.choice(state.restorable(stage)))
        gates = state.gates
        for layer in range(5):
            gone = {s: {u - 2 * layer for u in state.of(s)} & {0, 1} for s in STAGES}
            assert gates.decode_attention[layer] == (0 not in gone["decode"])
            assert gates.decode_mlp[layer] == (1 not in gone["decode"])
            assert gates.prefill_mlp[layer] == (1 not in gone["prefill"])
            kept = 0 not in gone["prefill"]
            skipped = "kv" if gates.decode_attention[layer] else "off"
            assert gates.prefill_attention[layer] == ("full" if kept else skipped)
        assert mode == "projected" or "kv" not in gates.prefill_attention
    extra = Removal(num_layers=5, mode="subset", grain="part", prefill=frozenset({3}))
    with pytest.raises(PlanError, match="which decode keeps"):
        extra.gates  # noqa: B018


def test_both_parts_of_a_block_are_the_block():
    parts = Removal(
        num_layers=5,
        mode="projected",
        grain="part",
        prefill=frozenset({2, 3}),
        decode=frozenset({6, 7}),
    )
    assert parts.gates == Gates.removing(5, prefill={1}, decode={3})


def test_a_count_of_blocks_is_a_count():
    goal = Goal.blocks(6, prefill=2, decode=1)
    state = Removal(num_layers=6, mode="projected", decode=frozenset({3}))
    assert (goal.missing(state, "prefill"), goal.missing(state, "decode")) == (2, 0)
    assert goal.least("prefill") == 2 and goal.redundant(state, "decode") == []
    assert goal.redundant(state.remove("decode", 1), "decode") == [1, 3]
    share = attention_share(tiny_config("llama", layers=6), LENGTHS)
    assert 0.2 < share < 0.8
    parts = Goal.blocks(6, decode=1, grain="part", attention=share)
    both = Removal(num_layers=6, mode="projected", grain="part", decode=frozenset({4, 5}))
    assert parts.met(both) and not parts.met(both.restore("decode", 4))


@pytest.mark.parametrize("mode", ["projected", "subset"])
@pytest.mark.parametrize("grain", ["block", "part"])
def test_moves_and_random_states_meet_each_goal_and_no_more(model, grain, mode):
    rng = random.Random(0)
    for name, goal in goals_of(model, grain, mode).items():
        state = random_state(Removal(num_layers=6, mode=mode, grain=grain), goal, rng)
        assert_minimal(goal, state)
        seen = set()
        for _ in range(100):
            state = swap(state, goal, rng)
            assert_minimal(goal, state)
            state.gates  # noqa: B018
            seen.add(state)
        assert len(seen) > 5, name


@pytest.mark.parametrize("mode", ["projected", "subset"])
@pytest.mark.parametrize("grain", ["block", "part"])
def test_operations_saved_are_at_least_those_asked_for(model, grain, mode):
    goal = goals_of(model, grain, mode)["flops"]
    policy = HandoverPolicy.full(6)
    whole = stage_flops(model.config, Gates.dense(6).without_dead_work(), policy, LENGTHS)
    head = 2 * LENGTHS.continuation * model.config.hidden_size * model.config.vocab_size
    rng = random.Random(1)
    for _ in range(20):
        state = random_state(Removal(num_layers=6, mode=mode, grain=grain), goal, rng)
        now = stage_flops(model.config, state.gates.without_dead_work(), policy, LENGTHS)
        assert now[0] <= 0.8 * whole[0] * (1 + 1e-6)
        assert now[1] - head <= 0.6 * (whole[1] - head) * (1 + 1e-6)
    last = range(6 * (1 if grain == "block" else 2))[-1]
    if mode == "projected":
        assert goal.prefill_U[last] == 0  # nothing reads prefill's last block


SNAP = (LayerKV(selector=SnapKV(window=3)),) * 6


def removed_by(model, state, rules=None):
    return removed_parameters(model, make_plan(model, state.gates.without_dead_work(), rules))


@pytest.mark.parametrize("rules", [None, SNAP], ids=["full", "snapkv"])
@pytest.mark.parametrize("grain", ["block", "part"])
@pytest.mark.parametrize("mode", ["projected", "subset", "unified"])
def test_parameters_saved_are_those_asked_for_and_less_than_a_unit_more(model, mode, grain, rules):
    """Where only one stage loses something; where both do, prefill may save more."""
    dense = Removal(num_layers=6, mode=mode, grain=grain)
    policy = None if rules is None else HandoverPolicy(rules=rules)
    rng, how = random.Random(2), {"grain": grain, "mode": mode, "policy": policy}
    unit = max(removed_by(model, dense.remove("decode", u))["decode"] for u in (0, 1))
    for _ in range(12):
        share = rng.uniform(0.05, 0.7)
        goal = Goal.parameters(model, decode_share=share, **how)
        removed = removed_by(model, random_state(dense, goal, rng), rules)
        assert share * (1 - 1e-9) <= removed["decode"] < share + unit
        if (mode, grain) == ("unified", "block"):
            assert removed["prefill"] >= share * (1 - 1e-9)
        both = Goal.parameters(model, prefill_share=share / 2, decode_share=share, **how)
        if mode != "unified":
            state = random_state(dense, both, rng)
            assert both.met(state) or (mode, grain) == ("subset", "part")
            if both.met(state):
                assert removed_by(model, state, rules)["prefill"] >= share / 2 * (1 - 1e-9)
        if mode == "projected":
            alone = (removed_by(model, dense.remove("prefill", u), rules) for u in (0, 1))
            most = max(removed["prefill"] for removed in alone)
            goal = Goal.parameters(model, prefill_share=most * 3.3, **how)
            removed = removed_by(model, random_state(dense, goal, rng), rules)
            assert most * 3.3 * (1 - 1e-9) <= removed["prefill"] < most * 4.3
            assert removed["decode"] == 0


def test_in_mode_subset_prefill_can_lose_every_block_that_decode_loses(model):
    goal = Goal.parameters(model, prefill_share=0.3, decode_share=0.3, mode="subset")
    last = frozenset({4, 5})
    state = Removal(num_layers=6, mode="subset", prefill=last, decode=last)
    assert goal.met(state) and not goal.met(state.restore("prefill", 5))
    assert goal.prefill_U[5] == goal.prefill_U[0] == goal.decode_U[0]


@pytest.mark.parametrize("name", [*ALL, "paper", "pdtrim"])
def test_each_method_meets_shares_of_the_parameters(model, name):
    text = calibration_of(model)
    method = {**ALL, "paper": Paper(), "pdtrim": PDTrim(annealing=Annealing(steps=6))}[name]
    modes = {"paper": ("subset",), "pdtrim": ("projected", "subset", "unified")}
    for mode in modes.get(name, getattr(method, "modes", ())):
        for prefill, decode in ((0.3, 0.3), (0.15, 0.3)):
            if (mode == "unified") != (prefill == decode):
                continue
            shares = {"prefill_share": prefill, "decode_share": decode}
            plan = method.plan(
                model, text, Target(repair="none", metric="parameters", mode=mode, **shares)
            ).plan
            removed = removed_parameters(model, plan)
            assert decode <= removed["decode"] < decode + 1 / 6
            if (mode, name) != ("unified", "blockpruner"):  # of parts, prefill may hold fewer
                assert removed["prefill"] >= prefill
            if name == "uidl":
                gone = [i for i, on in enumerate(plan.gates.decode_mlp) if not on]
                assert gone in ([i, i + 1] for i in range(5))


def test_prefills_run_passes_by_a_last_block_that_saves_nothing(model):
    flat = flatten(flatten(tiny_model("llama", layers=6), 5), 2, scale=0.1)  # 5 turns least, then 2
    shares = {"metric": "parameters", "prefill_share": 0.1}
    plan = (
        UIDL()
        .plan(flat, calibration_of(flat), Target(repair="none", mode="projected", **shares))
        .plan
    )
    assert removed_parameters(flat, plan)["prefill"] >= 0.1
    assert plan.gates == Gates.removing(6, prefill={2}).without_dead_work()
    counted = (
        UIDL()
        .plan(flat, calibration_of(flat), Target(repair="none", mode="projected", prefill_remove=1))
        .plan
    )
    assert counted.gates == Gates.dense(6).without_dead_work()


def test_a_run_grows_until_it_saves_enough(model):
    goal = Goal(prefill_U=(0.0,) * 6, decode_U=(2.0, 1.0, 1.0, 2.0, 1.0, 1.0), decode_needed=4.0)
    assert goal.least("decode") == 2  # but no two neighbours save 4
    text, target = calibration_of(model), Target(repair="none", mode="unified")
    problem = Problem.of(model, text, target, progress=silent, journal=None)
    vars(problem)["goal"] = goal  # in place of the target's
    chosen = UIDL().choose(problem)
    first = min(chosen.state.decode)
    assert goal.met(chosen.state) and chosen.state.decode == {first, first + 1, first + 2}


def test_shares_that_a_method_cannot_reach_are_refused(model):
    text, shares = calibration_of(model), {"metric": "parameters", "mode": "unified"}
    most = Target(repair="none", prefill_share=0.8, decode_share=0.8, **shares)
    with pytest.raises(PlanError, match=r"'sleb' protects the first 1 .* so 4 can go, not 5"):
        ALL["sleb"].plan(model, text, most)
    more = Target(
        repair="none", metric="parameters", mode="subset", prefill_share=0.5, decode_share=0.1
    )
    refusals = {
        "shortgpt": "prefill removes .*, which decode keeps",
        "blockpruner": "no units in mode 'subset' .* ask for less of prefill",
        "paper": "prefill cannot lose more blocks than decode",
    }
    for name, words in refusals.items():
        method = ALL.get(name, Paper())
        with pytest.raises(PlanError, match=words) as error:
            method.plan(model, text, more)
        assert "\n" not in str(error.value)
    short = random_batch(model, rows=2, prompt=1, new=6)
    bare = Calibration(search=short, rerank=short, fit=short, source="x", hash="0" * 64)
    alone = Target(repair="none", metric="parameters", mode="projected", prefill_share=0.1)
    with pytest.raises(PlanError, match="prompts of 1 token"):
        ALL["shortgpt"].plan(model, bare, alone)


@pytest.mark.parametrize("search", [greedy, one_shot])
@pytest.mark.parametrize("name", ["blocks", "parameters", "flops", "kv_bytes", "latency"])
def test_searches_meet_each_goal_and_no_more(model, name, search):
    goal = goals_of(model, "part", "projected")[name]
    objective = Objective(model, random_batch(model, rows=2))
    dense = Removal(num_layers=6, mode="projected", grain="part")
    assert_minimal(goal, search(objective, objective.measure(dense), goal).state)


def test_greedy_weighs_harm_by_what_it_saves(model):
    batch = random_batch(model, rows=4)
    objective = Objective(model, batch)
    start = objective.measure(Removal(num_layers=6, mode="projected"))
    harm = {u: objective.measure(start.state.remove("decode", u)).loss for u in range(6)}
    cheap, dear = min(harm, key=harm.get), max(harm, key=harm.get)
    saving_U = tuple(1000.0 if u == dear else 1.0 for u in range(6))
    goal = Goal(prefill_U=(1.0,) * 6, decode_U=saving_U, decode_needed=900.0)
    assert goal.price(start.state, "decode", dear, 9.0) == 0.01  # beyond 900 it saves for nothing
    assert greedy(objective, start, goal).state.decode == {dear}
    first = Objective(model, batch)
    greedy(first, first.measure(start.state), goal)
    assert max(len(s.decode) for s in first.memo) == 1  # the first step took it
    small = replace(goal, decode_needed=1.0)
    assert greedy(objective, start, small).state.decode == {cheap}


def test_latency_has_a_time_for_each_unit(model):
    lengths = Lengths(prompt=12, continuation=6)
    for grain, units in (("block", 6), ("part", 12)):
        seconds = measure_latency(model, lengths, grain=grain, repeats=1)
        assert {stage: len(times) for stage, times in seconds.items()} == {
            "prefill": units,
            "decode": units,
        }
        assert all(t > 0 for t in seconds["decode"]) and all(t >= 0 for t in seconds["prefill"])


@pytest.mark.parametrize("search", ["one_shot", "greedy", "anneal", "evolution", "hybrid"])
@pytest.mark.parametrize("grain", ["block", "part"])
def test_the_method_runs_each_search_and_grain(model, search, grain):
    target = Target(repair="none", prefill_remove=1, decode_remove=2, search=search, grain=grain)
    plan = PDTrim(annealing=Annealing(steps=6)).plan(model, calibration_of(model), target).plan
    gates = plan.gates
    lost = [not on for on in (*gates.decode_attention, *gates.decode_mlp)]
    assert sum(lost) == 4 if grain == "block" else sum(lost) >= 3
    if grain == "block":
        assert gates.decode_attention == gates.decode_mlp


@pytest.mark.parametrize("metric,prefill", [("flops", 0.2), ("kv_bytes", 0.0), ("latency", 0.2)])
def test_the_method_plans_by_each_metric(model, metric, prefill):
    target = Target(
        repair="none",
        metric=metric,
        prefill_share=prefill,
        decode_share=0.3,
        search="greedy",
        grain="part",
    )
    gates = PDTrim().plan(model, calibration_of(model), target).plan.gates
    if metric == "kv_bytes":
        assert sum(gates.decode_attention) == 4 and all(gates.decode_mlp)  # 2 of 6 save 0.33
    else:
        assert first_difference(gates, Gates.dense(6)) < 6


@pytest.mark.parametrize(
    "target,words",
    [
        (Target(repair="none", prefill_share=0.2), "give no shares"),
        (Target(repair="none", metric="flops", prefill_remove=1), "goes by shares"),
        (Target(repair="none", metric="flops", decode_share=1.0), "below 1"),
        (Target(repair="none", metric="parameters", decode_remove=1), "goes by shares"),
        (
            Target(
                repair="none",
                metric="parameters",
                mode="unified",
                prefill_share=0.1,
                decode_share=0.2,
            ),
            "ask the same of both",
        ),
        (Target(repair="none", metric="kv_bytes", prefill_share=0.2), "decode's share only"),
    ],
)
def test_goals_that_make_no_sense(model, target, words):
    with pytest.raises(PlanError, match=words):
        PDTrim().plan(model, calibration_of(model), target)


def test_what_cannot_be_met_is_said(model):
    config = model.config
    goal = Goal.flops(config, LENGTHS, prefill_share=0.99)  # keys and values are still made
    dense = Removal(num_layers=6, mode="projected")
    objective = Objective(model, random_batch(model))
    assert not goal.met(greedy(objective, objective.measure(dense), goal).state)
    with pytest.raises(PlanError, match="prefill cannot save that much"):
        PDTrim().plan(
            model, calibration_of(model), Target(repair="none", metric="flops", prefill_share=0.99)
        )
    with pytest.raises(PlanError, match="does not know grain 'part'"):
        Paper().plan(
            model,
            calibration_of(model),
            Target(repair="none", mode="subset", decode_remove=1, grain="part"),
        )
    assert torch.is_inference_mode_enabled() is False
