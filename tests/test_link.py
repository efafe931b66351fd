"""What a user knows of the link, as a KV policy."""

import pytest

from helpers import tiny_model
from pdtrim.bench.rounds import arrival
from pdtrim.errors import PlanError
from pdtrim.kvfit.link import FULL, CodecSpeed, LinkBudget, Machine, break_even, exposed
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


LAYER = TOKEN * 100 / 4  # bytes of a layer of 100 tokens
SPEEDS = {
    "any": CodecSpeed(encode_gb_s=1.0, decode_gb_s=1.0),
    "packed": CodecSpeed(encode_gb_s=4.0, decode_gb_s=4.0),
}


@pytest.mark.parametrize(
    "link,layer_s,policy",
    [
        # nothing to hide behind: of 4 layers plain moves 4 m, the entropy codec takes
        # 2 e + m / 4 + 3 e, so it pays while 3.75 m > 5 e, below 6 Gbit/s
        (5.9, 0.0, "budget:compression=4"),
        (6.1, 0.0, "budget:compression=4,codecs=packed"),
        (23.9, 0.0, "budget:compression=4,codecs=packed"),
        (24.1, 0.0, "full"),
        # all hidden but the last layer: 0.75 m > 2 e, below 3 Gbit/s
        (2.9, 1.0, "budget:compression=4"),
        (3.1, 1.0, "budget:compression=4,codecs=packed"),
        (11.9, 1.0, "budget:compression=4,codecs=packed"),
        (12.1, 1.0, "full"),
    ],
)
def test_codes_are_sent_where_they_shorten_the_wait(link, layer_s, policy):
    wish = LinkBudget(compression=4.0, link_gbit_s=link)
    machine = Machine(codecs=SPEEDS, layer_s=layer_s)
    assert wish.policy(MODEL, FULL, 100, machine=machine) == parse_policy(policy)
    assert wish.policy(MODEL, FULL, 100).text == "budget:compression=4"


def test_a_link_that_prefill_hides_needs_no_code_that_is_slower_than_prefill():
    # plain: 4 layers hide behind prefill but the last; coded: encoding falls behind prefill
    move = LAYER / (8e9 / 8)
    slow = {"any": CodecSpeed(encode_gb_s=0.1, decode_gb_s=10.0)}
    wish = LinkBudget(compression=100.0, link_gbit_s=8.0)
    assert wish.policy(MODEL, FULL, 100, machine=Machine(codecs=slow, layer_s=move)) == FULL


@pytest.mark.parametrize("layer_s", [0.0, 0.5, 1.5, 9.0])
@pytest.mark.parametrize("parts", [(1.0, 2.0, 0.5), (0.0, 3.0, 0.0), (2.5, 0.1, 0.2)])
def test_the_exposed_time_is_when_the_last_of_equal_layers_is_decoded(parts, layer_s):
    encode, move, decode = parts
    encoder, encoded = 0.0, []
    for layer in range(5):
        encoder = max(encoder, (layer + 1) * layer_s) + encode
        encoded.append(encoder - 5 * layer_s)
    by_layer = arrival(encoded, [move] * 5, [decode] * 5)
    assert exposed(*parts, layers=5, layer_s=layer_s) == pytest.approx(by_layer)
