"""What a user knows of the link, as a KV policy."""

import pytest

from helpers import tiny_model
from pdtrim.errors import PlanError
from pdtrim.kvfit.link import FULL, LinkBudget, break_even
from pdtrim.kvfit.policy import parse_policy

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
    otherwise = FULL if wish else parse_policy("tova")
    assert LinkBudget(**wish).policy(MODEL, otherwise, 100) == parse_policy(policy)


@pytest.mark.parametrize(
    "wish,otherwise,words",
    [
        ({"compression": 2.0, "bytes_per_token": 3.0}, "full", "give one of"),
        ({"handover_ms": 2.0}, "full", "needs --link"),
        ({"link_gbit_s": 2.0}, "full", "needs one of"),
        ({"compression": 0.5}, "full", "at least 1"),
        ({"bytes_per_token": -1.0}, "full", "above 0"),
        ({"compression": 2.0}, "tova", "not both"),
    ],
)
def test_wishes_that_make_no_sense(wish, otherwise, words):
    with pytest.raises(PlanError, match=words):
        LinkBudget(**wish).policy(MODEL, parse_policy(otherwise), 100)


def test_break_even_by_hand():
    # 4x at 2 GB/s: three quarters of 16 Gbit/s
    assert break_even(4, 2) == pytest.approx(12)
    assert break_even(1, 1) == break_even(0.5, 1) == 0
    # at that speed both ways take the same time, and below it the encoded one takes less
    n, compression, rate = 3e8, 3.0, 1.2
    link = break_even(compression, rate) / 8 * 1e9
    seconds = n / (rate * 1e9)
    assert seconds + n / compression / link == pytest.approx(n / link)
    assert seconds + n / compression / (link / 2) < n / (link / 2)


@pytest.mark.parametrize(
    "link,policy",
    [
        (2.0, "budget:compression=4"),  # the entropy codec pays below 0.75 * 0.5 * 8 = 3 Gbit/s
        (5.0, "budget:compression=4,codecs=packed"),  # the packed ones below 12
        (13.0, "full"),
    ],
)
def test_a_link_that_outruns_a_codec_does_without_it(link, policy):
    wish = LinkBudget(compression=4.0, link_gbit_s=link)
    speeds = {"any": 0.5, "packed": 2.0}
    assert wish.policy(MODEL, FULL, 100, codec_gb_s=speeds) == parse_policy(policy)
    assert wish.policy(MODEL, FULL, 100).text == "budget:compression=4"
