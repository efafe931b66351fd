"""A pair with codecs in tensor parallel, on real vLLM servers of two ranks each."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

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
    GPU,
    agree,
    coded_rules,
    commands,
    completion,
    idle,
    post,
    prefill,
    prompt_of,
    running,
    tiny_pair,
    tokens_of,
    until,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(GPU and torch.cuda.device_count() < 2, reason="two ranks need two GPUs"),
]

RANKS = 2
TIE = 0.05
"""Nats, as for codecs on one rank: rounding that flips a code may swap what is nearer."""
LENGTHS = (1, 32, 33, 84, 115, 300)
HERE = {"CUDA_VISIBLE_DEVICES": "0,1"} if GPU else {"TORCH_COMPILE_DISABLE": "1"}
"""Ranks share the GPUs; on a CPU each would compile vLLM's lookup of its part of the vocabulary."""
SMALL = () if GPU else ("--kv-cache-memory-bytes", "64M")


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tiny_folder):
    """Two KV heads, with biases."""
    return tiny_pair(tmp_path_factory.mktemp("parallel"), tiny_folder, coded_rules(), "qwen2")


@pytest.fixture(scope="module")
def servers(pair, tmp_path_factory):
    args = (*ARGS, *SMALL)
    made = commands(pair, tensor_parallel=RANKS, prefill_args=args, decode_args=args)
    started = [replace(process, env={**process.env, **HERE}) for process in made]
    for process in started:
        process.env.pop("VLLM_CPU_KVCACHE_SPACE", None)  # whole GiB a rank, before SMALL
    with running(started, tmp_path_factory.mktemp("log")) as answering:
        yield answering


def test_tokens_are_the_simulators_and_each_rank_reads_its_own_heads(pair, servers):
    source, decode, router = servers
    simulated = load_pair(pair)
    _, plan = simulated
    with ThreadPoolExecutor(len(LENGTHS)) as pool:
        made = list(pool.map(lambda n: post(router.url, completion(prompt_of(n))), LENGTHS))
    tokens = {n: tokens_of(answer) for n, answer in zip(LENGTHS, made, strict=True)}
    assert all(agree(simulated, prompt_of(n), tokens[n], tie=TIE) for n in LENGTHS)
    whole = HandoverPolicy.full(8)
    assert not all(agree(simulated, prompt_of(n), tokens[n], whole, TIE) for n in LENGTHS)
    until(lambda: decode.metric("pdtrim:handover_seconds_count") == len(LENGTHS))
    assert decode.metric("vllm:nixl_num_descriptors_sum") == RANKS * len(LENGTHS)
    sent = decode.metric("pdtrim:kv_bytes_sent_total")
    forms = [Form.of(plan, DTYPE, n, BLOCK, RANKS) for n in LENGTHS]
    assert 0 < sent < RANKS * sum(form.most for form in forms)  # a bound: entropy's lengths vary
    raw = sum(bytes_sent(plan, n, BLOCK, DTYPE.itemsize) for n in LENGTHS)
    assert decode.metric("pdtrim:kv_bytes_skipped_total", reason="codec") == raw - sent > 0
    until(lambda: idle(source, decode))


def test_a_range_that_one_rank_refuses_fails_the_request(servers):
    """The other one reads its own range, which is sound."""
    source, decode, router = servers
    before = decode.metric("pdtrim:refused_requests_total")
    name, body = prefill(source, completion(prompt_of(100)))
    sizes = body["kv_transfer_params"][TICKET]["bytes"]
    assert len(sizes) == RANKS
    sizes[1] -= 64
    assert post(decode.url, body, request_id=name)[0] == 500
    name, body = prefill(source, completion(prompt_of(100)))
    body["kv_transfer_params"][TICKET]["nonce"] = "00" * 16
    assert post(decode.url, body, request_id=name)[0] == 500
    until(lambda: decode.metric("pdtrim:refused_requests_total") == before + 2)
    assert post(router.url, completion(prompt_of(100)))[0] == 200
    until(lambda: idle(source, decode))
