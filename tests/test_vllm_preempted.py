"""Requests that decode preempts, inside vLLM's own classes, without a server."""

import pytest
import torch

pytest.importorskip("vllm")

from pdtrim.engines.ranges import Form, Ticket
from pdtrim.engines.vllm.coded import TICKET
from pdtrim.engines.vllm.metrics import LOCAL
from pdtrim.engines.vllm.preempted import HostPages
from test_vllm_coded import BLOCK, GOES, WHERE, finish, request, scheduler, served, step


def pages(*groups, hashed=()):
    """vLLM's record of what a request holds; page 0 is the null block."""
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

    def block(number):
        made = KVCacheBlock(number)
        made.is_null = number == 0
        if number in hashed:
            made._block_hash = b"hash"
        return made

    return KVCacheBlocks(tuple([block(number) for number in group] for group in groups))


def test_a_preempted_prompt_comes_back_in_its_new_pages():
    made = scheduler("decode")
    form = Form.of(served("decode").plan, torch.float32, 40, BLOCK)
    ticket = Ticket(offset=64, sizes=(form.most,), nonce=bytes(16)).to_json()
    one = request("a", 40, **WHERE, **{TICKET: ticket})
    assert made.get_num_new_matched_tokens(one, 0) == (40, True)
    made.update_state_after_alloc(one, pages([3, 4], [0, 5]), 40)
    assert step(made).reqs_to_recv.keys() == {"a"}
    one.num_preemptions = 1
    meta = step(made, preempted={"a", "local"})
    assert meta.pdtrim_to_keep == {"a": ([3, 4], [5])} and not meta.pdtrim_to_restore
    assert made.get_num_new_matched_tokens(one, 0) == (40, True)
    made.update_state_after_alloc(one, pages([7, 9], [0, 8]), 40)
    meta = step(made)
    assert meta.pdtrim_to_restore == {"a": ([7, 9], [8])}
    assert not meta.pdtrim_to_keep and not meta.reqs_to_recv
    # preempted and back within one step; a page was found in decode's own prefix cache
    assert made.get_num_new_matched_tokens(one, 32) == (8, True)
    made.update_state_after_alloc(one, pages([7, 1, 2], [8, 6], hashed={7, 8}), 8)
    meta = step(made, preempted={"a"})
    assert meta.pdtrim_to_keep == {"a": ([7, 9], [8])}
    assert meta.pdtrim_to_restore == {"a": ([1, 2], [6])}
    assert made.get_num_new_matched_tokens(one, 64) == GOES, "all of it was found there"
    finish(made, one)
    meta = step(made, preempted={"a"}, finished={"a"})
    assert not meta.pdtrim_to_keep and meta.pdtrim_finished == {"a"}


def test_a_local_prompt_that_is_preempted_is_computed_again_and_counted_once():
    made = scheduler("decode")
    made._count_local = True
    one = request("a", 40)
    for one.num_preemptions in (0, 1):
        assert made.get_num_new_matched_tokens(one, 0) == GOES
        made.update_state_after_alloc(one, pages([3, 4], [0, 5]), 0)
        preempted = {"a"} if one.num_preemptions else set()
        assert not step(made, preempted=preempted).pdtrim_to_keep
    assert made.take_stats().data[LOCAL] == [1]


def test_pages_wait_on_the_host_and_come_back_whole():
    caches = {name: torch.randn(9, 2, BLOCK, 16) for name in ("first", "second")}
    before = {name: cache.clone() for name, cache in caches.items()}
    host = HostPages(caches, {"first": 0, "second": 1})
    host.keep("a", ([3, 4, 5], [6]))
    for cache in caches.values():
        cache.zero_()
    host.restore("a", ([8, 1], [2]))
    assert torch.equal(caches["first"][[8, 1]], before["first"][[4, 5]])
    assert torch.equal(caches["second"][2], before["second"][6])
    assert [int(cache.any((1, 2, 3)).sum()) for cache in caches.values()] == [2, 1]
    host.keep("b", ([1], [2]))
    host.drop("b")
    host.drop("unknown")
    with pytest.raises(KeyError):
        host.restore("b", ([1], [2]))
