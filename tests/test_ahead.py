"""Keys and values that are fitted before the search, and the search that measures with them."""

import pytest
import torch

from helpers import FAMILIES, random_batch, random_text, tiny_model, trimmed
from pdtrim.methods import PDTrim, Target
from pdtrim.plan import Gates
from pdtrim.repair.ahead import Ahead, sources
from pdtrim.repair.apply import KV_RIDGE, repair
from pdtrim.repair.dense import DenseText
from pdtrim.search.objective import Objective
from pdtrim.search.state import Removal
from pdtrim.stage.forward import Pair

L = 6


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen2", layers=L, vocab_size=300)


@pytest.fixture(scope="module")
def text(model):
    return random_text(model, prompt=40, new=12)


def ahead(model, batch):
    return Ahead(Pair.dense(model), DenseText(model, batch, stages=("prefill",)), ridge=KV_RIDGE)


def test_a_run_of_skipped_blocks_reads_the_stream_before_it():
    gates = Gates.removing(L, prefill={0, 1, 3}).without_dead_work()
    assert sources(gates) == {1: 0}  # 3 reads what 2 has just written
    assert sources(Gates.removing(L, prefill={2, 3, 4}).without_dead_work()) == {3: 2, 4: 2, 5: 2}
    parts = Gates.without(L, attention=({2, 3}, set()), mlp=({2}, set())).without_dead_work()
    assert sources(parts) == {3: 2}
    assert sources(Gates.dense(L).without_dead_work()) == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_behind_a_whole_model_the_fit_is_the_repairs(family):
    """Fused projections, biases and the norms of each family included."""
    model = tiny_model(family, layers=L, vocab_size=300)
    fit = random_batch(model, rows=4, prompt=40, new=12, seed=3)
    gates = Gates.removing(L, prefill={3, 4, 5}).without_dead_work()
    wanted = repair(model, trimmed(model, gates), fit, "kv", stages=("prefill",))["prefill"]
    made = ahead(model, fit).pair(gates).prefill
    for layer in (4, 5):
        own = made.block(layer).module
        for name, weight in wanted[layer].items():
            torch.testing.assert_close(own.get_parameter(name), weight, atol=1e-5, rtol=1e-4)
            assert not torch.equal(weight, model.block(layer).module.get_parameter(name))
    assert made.block(2).module is model.block(2).module


def test_a_state_measured_from_its_neighbour_is_as_if_measured_alone(model, text):
    pair_of = ahead(model, text.fit).pair
    near = Removal(num_layers=L, mode="projected", prefill=frozenset({2, 3, 4}))
    resumed = Objective(model, text.search, pair_of=pair_of)
    resumed.stand_on(resumed.measure(near))
    for state in (
        near.remove("prefill", 5),
        near.restore("prefill", 3),
        near.restore("prefill", 2),
    ):
        alone = Objective(model, text.search, pair_of=pair_of).measure(state).loss
        assert resumed.measure(state).loss == pytest.approx(alone, abs=1e-6)
        bare = Objective(model, text.search).measure(state).loss
        fits = sources(state.gates.without_dead_work())
        assert (abs(alone - bare) > 1e-5) == bool(fits)


@pytest.mark.parametrize("repair", ["best", "none"])
def test_the_search_measures_with_the_fits_if_a_repair_follows(model, text, repair):
    target = Target(prefill_remove=3, search="greedy", repair=repair, recall=0.0)
    plan = PDTrim().plan(model, text, target).plan
    gone = frozenset(i for i, runs in enumerate(plan.gates.prefill_mlp[:-1]) if not runs)
    state = Removal(num_layers=L, mode="projected", prefill=gone | {L - 1})
    pair_of = ahead(model, text.fit).pair if repair == "best" else None
    assert sources(state.gates.without_dead_work())
    loss = Objective(model, text.search, pair_of=pair_of).measure(state).loss
    assert plan.provenance.search_kl == pytest.approx(loss, abs=1e-5)
