"""What a user knows of the link, as a KV policy."""

import pytest

from helpers import tiny_model
from pdtrim.errors import PlanError
from pdtrim.search.link import LinkBudget

MODEL = tiny_model("llama", layers=4)
TOKEN = 4 * 2 * 2 * 8 * 2  # layers x (K, V) x KV heads x width x bf16


@pytest.mark.parametrize(
    "wish,policy",
    [
        ({}, "tova"),
        ({"compression": 5.0}, "budget:compression=5"),
        ({"compression": 1.0}, "full"),
        ({"bytes_per_token": TOKEN / 4}, "budget:compression=4"),
        ({"bytes_per_token": TOKEN * 2}, "full"),
        ({"handover_ms": 1.0, "link_gbit_s": TOKEN * 100 * 8 / 2e6}, "budget:compression=2"),
        ({"handover_ms": 1.0, "link_gbit_s": 100.0}, "full"),
    ],
)
def test_a_wish_becomes_a_policy(wish, policy):
    otherwise = "full" if wish else "tova"
    assert LinkBudget(**wish).policy(MODEL, otherwise, 100) == policy


@pytest.mark.parametrize(
    "wish,otherwise,words",
    [
        ({"compression": 2.0, "bytes_per_token": 3.0}, "full", "give one of"),
        ({"handover_ms": 2.0}, "full", "belong together"),
        ({"compression": 0.5}, "full", "at least 1"),
        ({"bytes_per_token": -1.0}, "full", "above 0"),
        ({"compression": 2.0}, "tova", "not both"),
    ],
)
def test_wishes_that_make_no_sense(wish, otherwise, words):
    with pytest.raises(PlanError, match=words):
        LinkBudget(**wish).policy(MODEL, otherwise, 100)
