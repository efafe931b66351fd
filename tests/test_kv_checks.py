"""Whether a measurement of KV policies can be trusted: what its checks say."""

from __future__ import annotations

import math

import pytest

from pdtrim.evaluate.kv_checks import sanity

GOOD_KL = {"full": 0.0, "first_last": 0.4, "random": 0.9}


def good() -> dict[str, dict[str, float]]:
    return {
        "full": {"needle_hidden": 0.8, "kept_at_most": 1.0},
        "first_last": {"needle_hidden": 0.2, "kept_at_most": 0.25},
        "random": {"needle_hidden": 0.0, "kept_at_most": 0.25},
    }


def test_sound_numbers_have_no_problem():
    assert sanity(good(), GOOD_KL) == []
    assert sanity(good(), {**GOOD_KL, "other": 5.0}) == []
    renamed = {{"random": "dice"}.get(name, name): row for name, row in good().items()}
    kls = {"full": 0.0, "first_last": 0.4, "dice": 0.9}
    assert sanity(renamed, kls, random="dice") == []


@pytest.mark.parametrize(
    ("name", "kl", "says"),
    [
        ("full", 0.01, "unpruned"),
        ("full", -0.01, "unpruned"),
        ("full", math.nan, "unpruned"),
        ("random", 0.4, "not above"),
        ("random", 0.1, "not above"),
        ("random", math.nan, "not above"),
    ],
)
def test_each_broken_kl_is_told(name, kl, says):
    (problem,) = sanity(good(), {**GOOD_KL, name: kl})
    assert says in problem and f"'{name}'" in problem


@pytest.mark.parametrize(
    ("name", "metric", "value", "says"),
    [
        ("random", "kept_at_most", 0.5, "do not compare"),
        ("random", "kept_at_most", math.nan, "do not compare"),
        ("first_last", "needle_hidden", 0.8, "about 0.200"),
        ("first_last", "needle_hidden", math.nan, "about 0.200"),
    ],
)
def test_each_broken_share_is_told(name, metric, value, says):
    suite = good()
    suite[name][metric] = value
    (problem,) = sanity(suite, GOOD_KL)
    assert says in problem


def test_needles_count_within_the_tolerance_and_where_full_finds_them():
    suite = good()
    suite["first_last"]["needle_hidden"] = 0.3
    assert sanity(suite, GOOD_KL) == []
    assert len(sanity(suite, GOOD_KL, tolerance=0.05)) == 1
    suite["full"]["needle_hidden"] = 0.59
    suite["first_last"]["needle_hidden"] = 0.59
    assert sanity(suite, GOOD_KL) == []
    suite["full"]["needle_hidden"] = 0.6
    assert len(sanity(suite, GOOD_KL)) == 1


@pytest.mark.parametrize("name", ["full", "first_last", "random"])
def test_what_was_not_measured_was_not_checked(name):
    assert sanity(good(), {k: v for k, v in GOOD_KL.items() if k != name}) == [
        f"'{name}': no KL was measured"
    ]
    suite = good()
    del suite[name]
    assert all(f"'{name}'" in problem for problem in sanity(suite, GOOD_KL))
    assert sanity(suite, GOOD_KL)
