"""Two decode blocks into one, held against the simulator."""

import pytest
import torch

from helpers import random_batch, tiny_model, trimmed
from pdtrim.distill.merge import MergeConfig, better_slot, merge, observe
from pdtrim.errors import PlanError
from pdtrim.models.swap import swap_blocks
from pdtrim.plan import Gates
from pdtrim.stage.forward import Pair, Trimmed


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def error_in_the_simulator(model, batch, first, slot, decode=None):
    """Relative error behind the pair when decode runs only ``slot`` of the two."""
    other = 2 * first + 1 - slot
    gates = Gates.removing(model.num_layers, decode={other})
    with torch.no_grad():
        target = Trimmed.dense(model).streams(batch)[first + 2][1]
        pair = Pair(prefill=model, decode=decode or model)
        out = trimmed(pair, gates).streams(batch)[first + 2][1]
    spread = target - target.mean((0, 1))
    return float((out - target).square().mean() / spread.square().mean())


def test_the_nearer_block_is_where_a_merge_begins():
    chosen = set()
    for seed in range(3):
        model = tiny_model("mistral", layers=5, seed=seed)
        batch = random_batch(model, rows=10, prompt=12)
        for first in range(3):
            errors = {
                slot: error_in_the_simulator(model, batch, first, slot)
                for slot in (first, first + 1)
            }
            slot, error = better_slot(model, observe(model, batch, first))
            assert slot == min(errors, key=errors.get)
            assert error == pytest.approx(errors[slot], rel=1e-4)
            chosen.add(slot - first)
    assert chosen == {0, 1}


def test_local_regression_lowers_the_error(model):
    batch = random_batch(model, rows=32, seed=4)
    config = MergeConfig(steps=60, learning_rate=5e-3, rows=8, compute="float32")
    merged = merge(model, batch, 1, config)
    assert merged.merged == (1, 2) and merged.layer in merged.merged
    assert merged.error_after < 0.6 * merged.error_before
    decode = swap_blocks(model, {merged.layer: merged.weights})
    measured = error_in_the_simulator(model, batch, 1, merged.layer, decode)
    assert measured == pytest.approx(merged.error_after, rel=1e-4)
    again = merge(model, batch, 1, config)
    assert all(torch.equal(t, again.weights[name]) for name, t in merged.weights.items())


def test_a_merge_never_makes_it_worse(model):
    batch = random_batch(model, rows=4, seed=4)
    wild = MergeConfig(steps=2, learning_rate=10.0, rows=4, compute="float32")
    merged = merge(model, batch, 1, wild)
    assert merged.error_after == merged.error_before
    own = dict(model.block(merged.layer).module.named_parameters())
    assert all(torch.equal(t, own[name]) for name, t in merged.weights.items())
    with pytest.raises(PlanError, match="to merge"):
        merge(model, batch, 3, wild)
