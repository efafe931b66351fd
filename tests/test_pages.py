"""Which pages a plan drops, and what it sends. No vLLM here."""

import pytest

from helpers import first_last, make_plan, tiny_model
from pdtrim.engines.pages import (
    bytes_sent,
    check_servable,
    groups,
    hole_of,
    padding,
    page_bytes,
    pages_of,
    pages_sent,
)
from pdtrim.errors import PlanError
from pdtrim.kv.codecs import parse_codec
from pdtrim.kv.selectors import SnapKV
from pdtrim.plan import Gates, LayerKV

RULES = [(0, 1), (1, 0), (20, 50), (32, 64), (33, 31), (4, 700)]


@pytest.mark.parametrize("first, last", RULES)
@pytest.mark.parametrize("block", [1, 16, 32])
def test_the_hole_is_what_the_simulator_drops(first, last, block):
    """Whole pages of the N - 1 tokens handed over, and none of them kept in part."""
    rule = first_last(first, last)
    for prompt in (1, 2, 31, 32, 33, 64, 65, 66, 97, 98, 129, 130, 300):
        keep = rule.selector.static_keep(1, prompt - 1, block_size=block)[0].tolist()
        start, stop = hole_of(rule, prompt, block)
        dropped = [not start * block <= token < stop * block for token in range(prompt - 1)]
        assert dropped == keep, prompt
        assert stop <= pages_of(prompt, block) or start == stop


def test_bytes_sent_are_pages_of_the_layers_that_decode_reads():
    model = tiny_model(layers=4)
    gates = Gates.removing(4, prefill={1, 2}, decode={2})
    kv = (first_last(16, 16), LayerKV(), first_last(1, 1), LayerKV())
    plan = make_plan(model, gates, kv, block_size=16)
    # 100 tokens fill 7 pages; layer 0 drops pages 1 .. 4 of them, layer 2 sends nothing
    assert [pages_sent(plan, layer, 100, 16) for layer in plan.sent_layers] == [7 - 4, 7, 7]
    assert page_bytes(plan, 0, 16, 2) == 2 * 2 * 8 * 16 * 2
    assert [page_bytes(plan, 0, 16, 2, ranks=n) for n in (2, 4)] == [2 * 8 * 16 * 2] * 2
    assert bytes_sent(plan, 100, 16, 2) == (3 + 7 + 7) * 2 * 2 * 8 * 16 * 2
    assert bytes_sent(plan, 100, 16, 2, ranks=2) * 2 == bytes_sent(plan, 100, 16, 2)


@pytest.mark.parametrize(
    "trimmed, padded",
    # of 12: groups of 12, 3, 4, 6; 5 and 7 become 7 and 7; 2 and 10 need no filling; 11 and 1
    [(0, 0), (12, 0), (3, 0), (4, 0), (6, 0), (5, 2), (7, 2), (2, 0), (11, 0)],
)
def test_padding_is_what_vllm_fills_its_groups_with(trimmed, padded):
    kv = tuple(first_last(1, 1) if i < trimmed else LayerKV() for i in range(12))
    assert padding(make_plan(tiny_model(layers=12), Gates.dense(12), kv, 32)) == padded


def test_padding_fills_up_what_does_not_divide():
    """5 and 8: groups of 5, the second of the 8 short of two."""
    kv = tuple(first_last(1, 1) if i < 5 else LayerKV() for i in range(13))
    plan = make_plan(tiny_model(layers=13), Gates.dense(13), kv, 32)
    assert groups(plan) == (3, 5) and padding(plan) == 2


def test_what_pages_cannot_carry_is_refused():
    model = tiny_model()
    gates = Gates.removing(4, decode={3})

    def plan(rule, block_size=32):
        return make_plan(model, gates, (LayerKV(), rule, LayerKV(), rule), block_size)

    check_servable(plan(first_last(4, 4)), 32)
    with pytest.raises(PlanError, match=r"pages of 32, the engine's hold 16.*--block-size 16"):
        check_servable(plan(first_last(4, 4)), 16)
    with pytest.raises(PlanError, match="layer 1: vLLM's pages cannot hold what 'snapkv' keeps"):
        check_servable(plan(LayerKV(selector=SnapKV())), 32)
    # a layer that does not travel may have any rule
    only_last = (LayerKV(), LayerKV(), LayerKV(), LayerKV(selector=SnapKV()))
    check_servable(make_plan(model, gates, only_last), 16)


def test_ranks_divide_the_heads_of_a_plan_with_codecs():
    model, coded = tiny_model(num_key_value_heads=4), LayerKV(codec=parse_codec("int8"))
    plan = make_plan(model, Gates.dense(4), (LayerKV(), coded, LayerKV(), LayerKV()))
    for ranks in (1, 2, 4):
        check_servable(plan, 32, ranks)
    for ranks in (3, 8):
        with pytest.raises(PlanError, match=f"4 KV heads in tensor parallel {ranks}: use a size"):
            check_servable(plan, 32, ranks)
    check_servable(make_plan(model, Gates.dense(4)), 32, 8)  # vLLM gives several ranks one head
