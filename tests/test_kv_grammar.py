"""How a user writes a KV policy, a codec and a budget: what is read, and what is refused how."""

from __future__ import annotations

import math
import random
import struct

import pytest

from helpers import random_batch, tiny_model
from pdtrim.errors import PlanError
from pdtrim.kv.codecs import parse_codec
from pdtrim.kvfit.budget import KVBudget
from pdtrim.kvfit.link import FULL, LinkBudget
from pdtrim.kvfit.policy import parse_policy
from pdtrim.kvfit.request import KVRequest

MODEL = tiny_model("llama", layers=2)
HUGE = "9" * 6000


def numbers(count, seed=0):
    """Doubles of every size that a budget may have, the largest included."""
    draw = random.Random(seed)
    made = [1.0, 1 + 2**-52, 7.52941, 2.304e4, 1e16, 123456789012345678, 1.7976931348623157e308]
    while len(made) < count:
        (value,) = struct.unpack("<d", draw.randbytes(8))
        if 1 <= value < math.inf:
            made.append(value)
        made.append(1 / draw.uniform(1e-4, 1))
    return made


@pytest.mark.parametrize("codecs", ["any", "packed"])
def test_a_budget_reads_what_it_writes(codecs):
    for value in numbers(2000):
        budget = KVBudget(compression=value, codecs=codecs)
        assert parse_policy(budget.text) == budget, value


def test_a_wish_in_bytes_is_read_again():
    """The full cache of this model has 128 bytes a token."""
    for wish in (0.001, 1.0, 3.3, 17.0, 127.0):
        made = LinkBudget(bytes_per_token=wish).policy(MODEL, FULL, 100)
        assert parse_policy(made.text).compression == 128 / wish


@pytest.mark.parametrize("text", ["5", "5.", "5.50", "05", "1e3", "1.5e+03", "2e0"])
def test_plain_numbers_are_budgets(text):
    assert parse_policy(f"budget:compression={text}").compression == float(text)


@pytest.mark.parametrize(
    "number",
    ["nan", "inf", "-1", "0", "0.99", "1e400", "", "1.2.3", "5e", "0x9", "\u0665", HUGE, "5\n"],
)
def test_bad_budgets_are_refused(number):
    refused(parse_policy, f"budget:compression={number}")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -1.0])
@pytest.mark.parametrize("wish", ["compression", "bytes_per_token", "handover_ms"])
def test_bad_wishes_are_refused(wish, value):
    more = {"link_gbit_s": 1.0} if wish == "handover_ms" else {}
    with pytest.raises(PlanError, match="must be a number above 0"):
        LinkBudget(**{wish: value}, **more).policy(MODEL, FULL, 100)
    with pytest.raises(PlanError, match="must be a number above 0"):
        LinkBudget(handover_ms=1.0, link_gbit_s=value).policy(MODEL, FULL, 100)


def test_a_wish_beyond_numbers_is_refused():
    with pytest.raises(PlanError, match="out of reach"):
        LinkBudget(bytes_per_token=1e-310).policy(MODEL, FULL, 100)


def refused(read, text):
    """In one line that shows no more of a user's text than its begin."""
    with pytest.raises(PlanError) as caught:
        read(text)
    message = str(caught.value)
    assert "\n" not in message and message.isprintable() and len(message) < 400


@pytest.mark.parametrize(
    "text",
    [
        *("int4:group=0", "int4:group=-1", "int4:rotate=maybe", "int4:first=1.5", "int4:group="),
        *("int5", "int", "k4v5", "int4:depth=3", "int4:name=raw", "int4:k_bits=3", "int4:group"),
        *("int4:group=1,group=2", "entropy:k_step=nan", "entropy:v_step=inf", "raw:group=1"),
        *(
            "lossless:depth=9",
            "",
            ":",
            "int\u0664",
            "int4:group=\u0664",
            "int4:rotate=true\x1b[31m",
        ),
        *(f"int4:{key}={10**30}" for key in ("group", "first", "recent")),
        *(f"int4:group={HUGE}", "int4" + ":" * 10**6, "x" * 10**6, f"entropy:first={10**30}"),
    ],
    ids=lambda text: text[:20],
)
def test_codecs_that_are_none_are_refused(text):
    refused(parse_codec, text)
    refused(KVRequest.parse, f"full+{text}")


@pytest.mark.parametrize(
    "text",
    [
        *(f"{name}:first={10**30}" for name in ("first_last", "snapkv", "tova", "duo", "gate")),
        *("snapkv:pool=99999", "snapkv:window=0", "expected_attention:horizon=1000000000000"),
        *("first_last:first=0,last=0", "first_last:first=-1", f"first_last:last={HUGE}"),
        *("first_last:layers=-1", "first_last:layers=1.5", f"first_last:layers={HUGE}"),
        *("first_last:layers=some", "first_last:cutoff=nan", "streaming:share=nan"),
        *(
            "snapkv:share=1e400",
            "h2o:recent=nan",
            "duo:share=inf",
            "random:seed=-1",
            "full:",
            "full:x",
        ),
        *(
            "first_last:first=1,first=2",
            "full:x",
            "first_last:,",
            "first_last:first=4\n",
            "first_last:first",
        ),
        *("first_last:name=full", "gate:weights=AAAA", "gate:threshold=1", "duo:full_heads=1"),
        *("first_last:depth=3", "full+", "full+int4+int8", "", "+", ":", "x" * 10**6),
        *("\x1b[31mfull", "full\u2028", "snapkv:" + "share=0.5," * 10**5, "FULL", "[bold]full"),
    ],
    ids=lambda text: repr(text[:20]),
)
def test_policies_that_are_none_are_refused(text):
    refused(parse_policy, text)


def test_any_text_gives_a_policy_or_one_line():
    """Pieces of the grammar in any order, seeded; what is read is a policy that can be built."""
    draw = random.Random(7)
    pieces = [
        *("full", "first_last", "streaming", "snapkv", "duo", "gate", "budget", "int4", "k3v2"),
        *("entropy", ":", ",", "+", "=", "first=", "last=", "share=", "layers=", "compression="),
        *("group=", "rotate=", "0", "4", "0.5", "nan", "1e9", "-3", "true", "auto", " ", "\t", "é"),
        *("codecs=packed", "9" * 20, "\x00", "pooling=max"),
    ]
    read = 0
    for _ in range(3000):
        text = "".join(draw.choices(pieces, k=draw.randint(1, 7)))
        try:
            parse_policy(text)
            read += 1
        except PlanError as error:
            assert str(error).isprintable() and len(str(error)) < 400, text
    assert read > 20


def test_a_rotation_that_the_model_has_no_width_for_is_refused_before_any_work():
    model = tiny_model("llama", layers=2, head_dim=24)
    with pytest.raises(PlanError, match="power of two, not 24"):
        parse_policy("full+int4:rotate=true").resolve(model, random_batch(model))
