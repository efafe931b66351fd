"""Bootstrap intervals, against cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pdtrim.errors import PdtrimError
from pdtrim.evaluate.statistics import mean_interval, paired_difference


def test_two_items_by_hand():
    # resampled means are 0, 1/2 and 1 with probability 1/4, 1/2, 1/4
    wide = mean_interval([0.0, 1.0], seed=0)
    assert (wide.mean, wide.low, wide.high) == (0.5, 0.0, 1.0)
    narrow = mean_interval([0.0, 1.0], seed=0, level=0.4)
    assert (narrow.low, narrow.high) == (0.5, 0.5)


def test_the_sign_is_a_minus_b():
    interval = paired_difference([3.0, 4.0, 5.0], [1.0, 2.0, 3.0], seed=0)
    assert (interval.mean, interval.low, interval.high) == (2.0, 2.0, 2.0)


def test_equal_inputs_differ_by_exactly_nothing():
    a_n = np.random.default_rng(0).normal(size=50)
    interval = paired_difference(a_n, a_n.copy(), seed=0)
    assert (interval.mean, interval.low, interval.high) == (0.0, 0.0, 0.0)


def test_interval_covers_the_true_difference_about_as_often_as_it_says():
    rng = np.random.default_rng(7)
    covered = 0
    for case in range(200):
        item_n = rng.normal(size=40)
        a_n = item_n + 0.3 + rng.normal(scale=0.5, size=40)
        b_n = item_n + rng.normal(scale=0.5, size=40)
        interval = paired_difference(a_n, b_n, seed=case, samples=1000)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_level_sets_the_width_of_a_normal_mean():
    a_n = np.random.default_rng(1).normal(size=400)
    error = a_n.std() / np.sqrt(400)
    for level, quantile in ((0.95, 1.960), (0.5, 0.674)):
        interval = mean_interval(a_n, seed=0, level=level)
        assert interval.high - interval.low == pytest.approx(2 * quantile * error, rel=0.08)


def test_pairing_narrows_the_interval_of_correlated_items():
    rng = np.random.default_rng(3)
    item_n = rng.normal(size=60)
    a_n, b_n = item_n + rng.normal(scale=0.1, size=60), item_n + rng.normal(scale=0.1, size=60)
    paired = paired_difference(a_n, b_n, seed=0)
    shuffled = paired_difference(a_n, rng.permutation(b_n), seed=0)
    assert paired.high - paired.low < 0.2 * (shuffled.high - shuffled.low)


def test_same_seed_same_interval_for_lists_arrays_and_tensors():
    a_n = np.random.default_rng(0).normal(size=30)
    first = mean_interval(a_n, seed=5)
    assert mean_interval(a_n.tolist(), seed=5) == first
    assert mean_interval(torch.tensor(a_n, requires_grad=True), seed=5) == first
    assert mean_interval(a_n, seed=6) != first
    assert mean_interval(torch.tensor([True, False, True, True]), seed=0).mean == 0.75
    assert mean_interval(torch.tensor([1, 3], dtype=torch.bfloat16), seed=0).mean == 2.0


def test_many_items_are_resampled_in_chunks_of_all_the_samples(monkeypatch):
    a_n = np.random.default_rng(0).normal(size=50)
    whole = mean_interval(a_n, seed=0, samples=999)
    monkeypatch.setattr("pdtrim.evaluate.statistics.CHUNK", 120)
    assert mean_interval(a_n, seed=0, samples=999) == whole


@pytest.mark.parametrize(
    "bad", [[], [1.0], [1.0, float("nan")], [1.0, float("inf")], [[1.0, 2.0], [3.0, 4.0]]]
)
def test_scores_without_an_interval_are_refused(bad):
    with pytest.raises(PdtrimError, match="interval needs"):
        mean_interval(bad, seed=0)


def test_unpaired_scores_and_senseless_settings_are_refused():
    with pytest.raises(PdtrimError, match="same items: 3 and 2"):
        paired_difference([1.0, 2.0, 3.0], [1.0, 2.0], seed=0)
    for settings, words in (
        ({"samples": 0}, "at least 1 sample"),
        ({"level": 1.0}, "level between"),
        ({"level": 0.0}, "level between"),
    ):
        with pytest.raises(PdtrimError, match=words):
            mean_interval([1.0, 2.0], seed=0, **settings)
