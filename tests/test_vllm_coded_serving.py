"""Pairs with codecs on real vLLM servers, through the router. On the CPU, over loopback."""

from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("vllm")

from pdtrim.engines.pages import bytes_sent
from pdtrim.engines.ranges import Form
from pdtrim.engines.vllm.coded import TICKET
from pdtrim.exported import load_pair
from pdtrim.kv.policy import HandoverPolicy
from vllm_servers import (
    ARGS,
    BLOCK,
    DTYPE,
    LENGTHS,
    agree,
    coded_rules,
    commands,
    completion,
    idle,
    post,
    prefill,
    prompt_of,
    refill,
    running,
    tiny_pair,
    tokens_of,
    until,
)

pytestmark = pytest.mark.slow

TIE = 0.05
"""Nats between the simulator's first two: rounding that flips a code may swap what is nearer."""


FEW = ("--num-gpu-blocks-override", str(4 * 1024 // BLOCK + 1))
"""Decode's pages hold one of the longest requests: of seven layers, four groups of two."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tiny_folder):
    return tiny_pair(tmp_path_factory.mktemp("coded"), tiny_folder, coded_rules())


@pytest.fixture(scope="module")
def servers(pair, tmp_path_factory):
    started = commands(pair, decode_args=(*ARGS, *FEW))
    with running(started, tmp_path_factory.mktemp("log")) as answering:
        yield answering


def test_tokens_are_the_simulators_and_bytes_one_range_a_prompt(pair, servers):
    """Eight at once."""
    source, decode, router = servers
    simulated = load_pair(pair)
    _, plan = simulated
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda n: post(router.url, completion(prompt_of(n))), LENGTHS))
    tokens = {n: tokens_of(answer) for n, answer in zip(LENGTHS, made, strict=True)}
    assert all(agree(simulated, prompt_of(n), tokens[n], tie=TIE) for n in LENGTHS)
    whole = HandoverPolicy.full(8)
    assert not all(agree(simulated, prompt_of(n), tokens[n], whole, TIE) for n in LENGTHS)
    until(lambda: decode.metric("pdtrim:handover_seconds_count") == len(LENGTHS))
    forms = [Form.of(plan, DTYPE, n, BLOCK) for n in LENGTHS]
    sent = decode.metric("vllm:nixl_bytes_transferred_sum")
    assert sent < sum(form.most for form in forms)  # a bound: lengths of entropy's vary
    assert sent == decode.metric("pdtrim:kv_bytes_sent_total")
    assert decode.metric("vllm:nixl_num_descriptors_sum") == len(LENGTHS)
    raw = sum(bytes_sent(plan, n, BLOCK, DTYPE.itemsize) for n in LENGTHS)
    assert decode.metric("pdtrim:kv_bytes_skipped_total", reason="codec") == raw - sent > 0
    until(lambda: idle(source, decode))


def test_preempted_requests_come_back(pair, servers):
    """In layers with and without a hole, coded and not."""
    source, decode, router = servers
    refill(load_pair(pair), source, decode, router, TIE)
    until(lambda: idle(source, decode))


def test_prefill_shares_prefixes(pair, servers):
    source, _, router = servers
    first = prompt_of(300, 8)
    assert post(router.url, completion(first))[0] == 200
    before = source.metric("vllm:prefix_cache_hits_total")
    second = [*first[:200], *prompt_of(77, 9)]
    assert agree(load_pair(pair), second, tokens_of(post(router.url, completion(second))), tie=TIE)
    assert source.metric("vllm:prefix_cache_hits_total") == before + 192


def test_a_range_of_another_request_is_refused(servers):
    source, decode, router = servers
    before = decode.metric("pdtrim:refused_requests_total")
    for change in ({"nonce": "00" * 16}, {"offset": 2**40}, {"bytes": 2**40}):
        name, body = prefill(source, completion(prompt_of(100)))
        body["kv_transfer_params"][TICKET] |= change
        assert post(decode.url, body, request_id=name)[0] == 500
    until(lambda: decode.metric("pdtrim:refused_requests_total") == before + 3)
    assert post(router.url, completion(prompt_of(100)))[0] == 200
    until(lambda: idle(source, decode))


def test_prompts_wait_until_those_that_nobody_reads_expire(servers):
    """The pool holds four of the longest."""
    source, decode, router = servers
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: prefill(source, completion(prompt_of(1000))), range(6)))
    assert post(router.url, completion(prompt_of(900)))[0] == 200
    until(lambda: idle(source, decode))
