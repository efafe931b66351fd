"""The test of drift: how often it cries wolf, and what it finds."""

import numpy as np
import pytest

from pdtrim.errors import PdtrimError
from pdtrim.evaluate.drift import p_value

WINDOWS = 600


def p_values(make, *, n, m, worse=1.0, shift=1.0, shuffles=199):
    """Of windows that each have a reference of their own, as the stated rate asks for."""
    rng = np.random.default_rng(0)
    return np.array(
        [
            p_value(shift * make(rng, n), make(rng, m), worse=worse, seed=i, shuffles=shuffles)
            for i in range(WINDOWS)
        ]
    )


def heavy(rng, count):
    """KLs as they are: above 0, most of them small."""
    return rng.lognormal(-3, 1.2, count)


@pytest.mark.parametrize("n, m", [(20, 6), (60, 60), (200, 8)])
def test_unchanged_text_is_called_changed_as_rarely_as_stated(n, m):
    """Of 600 windows at a level of 0.05: 30 expected, 46 or more by chance once in 300."""
    found = p_values(heavy, n=n, m=m)
    assert 15 <= (found <= 0.05).sum() <= 45
    assert 250 <= (found <= 0.5).sum() <= 350


def test_what_is_borne_makes_alarms_rarer():
    assert (p_values(heavy, n=60, m=60, worse=1.5) <= 0.05).sum() <= 10


def test_text_that_costs_three_times_as_much_is_found():
    found = p_values(heavy, n=100, m=60, worse=1.5, shift=3.0, shuffles=999)
    assert (found <= 0.01).mean() > 0.5


def test_text_that_costs_less_is_no_drift():
    assert p_values(heavy, n=100, m=60, shift=0.3).min() > 0.5


def test_a_p_is_repeatable_and_never_0():
    rng = np.random.default_rng(1)
    window, reference = 100 + rng.random(50), rng.random(50)
    first = p_value(window, reference, worse=1.0, seed=3)
    assert first == p_value(window, reference, worse=1.0, seed=3) == 1 / 10_000


@pytest.mark.parametrize("window", [[0.1], [0.1, float("nan")], []])
def test_what_cannot_be_tested_is_refused(window):
    with pytest.raises(PdtrimError, match="test of drift"):
        p_value(np.array(window), np.array([0.1, 0.2]), worse=1.0, seed=0)


def test_equal_numbers_are_no_drift():
    assert p_value(np.full(30, 0.2), np.full(8, 0.2), worse=1.0, seed=0) == 1
