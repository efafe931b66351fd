"""Pairs with codecs on real vLLM servers, through the router. On the CPU, over loopback."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("vllm")

from pdtrim.engines.pages import page_bytes, pages_sent
from pdtrim.engines.ranges import Form
from pdtrim.engines.vllm.coded import TICKET
from pdtrim.exported import load_pair
from pdtrim.kv.codecs import parse_codec
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.plan import LayerKV
from pdtrim.stage.forward import Batch, forward
from vllm_servers import (
    BLOCK,
    LENGTHS,
    RULE,
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

pytestmark = pytest.mark.slow

TIE = 0.05
"""Nats between the simulator's first two: rounding that flips a code may swap what is nearer."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tiny_folder):
    """Codecs of fixed and of varying length, two layers trimmed, one raw."""
    codecs = [parse_codec(name) for name in ("int4:group=32,recent=8", "entropy")]
    kv = [LayerKV(codec=codecs[layer % 2]) for layer in range(8)]
    for layer in (1, 4):
        kv[layer] = LayerKV(selector=RULE.selector, codec=codecs[layer % 2])
    kv[2] = LayerKV()
    return tiny_pair(tmp_path_factory.mktemp("coded"), tiny_folder, kv)


@pytest.fixture(scope="module")
def servers(pair, tmp_path_factory):
    started = commands(pair)
    with running(started, tmp_path_factory.mktemp("log")) as answering:
        yield answering


def agrees(simulated, prompt, tokens, policy=None):
    """Each token is the simulator's behind those before it, or all but ties with it."""
    pair, plan = simulated
    batch = Batch(prompt_BP=torch.tensor([prompt]), continuation_BC=torch.tensor([tokens]))
    with torch.no_grad():
        made = forward(pair, batch, plan.gates, policy or HandoverPolicy.of(plan))[0]
    logits_CV = made.log_softmax(-1)
    behind = logits_CV.amax(-1) - logits_CV.gather(-1, batch.continuation_BC[0][:, None])[:, 0]
    return bool((behind < TIE).all())


def test_tokens_are_the_simulators_and_bytes_one_range_a_prompt(pair, servers):
    """Eight at once."""
    source, decode, router = servers
    simulated = load_pair(pair)
    _, plan = simulated
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda n: post(router.url, completion(prompt_of(n))), LENGTHS))
    tokens = {n: tokens_of(answer) for n, answer in zip(LENGTHS, made, strict=True)}
    assert all(agrees(simulated, prompt_of(n), tokens[n]) for n in LENGTHS)
    whole = HandoverPolicy.full(8)
    assert not all(agrees(simulated, prompt_of(n), tokens[n], whole) for n in LENGTHS)
    until(lambda: decode.metric("pdtrim:handover_seconds_count") == len(LENGTHS))
    forms = [Form.of(plan, torch.float32, n, BLOCK) for n in LENGTHS]
    sent = decode.metric("vllm:nixl_bytes_transferred_sum")
    assert sent < sum(form.most for form in forms)  # a bound: lengths of entropy's vary
    assert sent == decode.metric("pdtrim:kv_bytes_sent_total")
    assert decode.metric("vllm:nixl_num_descriptors_sum") == len(LENGTHS)
    raw = sum(pages_sent(plan, n, BLOCK) for n in LENGTHS) * page_bytes(plan, BLOCK, 4)
    assert decode.metric("pdtrim:kv_bytes_skipped_total", reason="codec") == raw - sent > 0
    until(lambda: idle(source, decode))


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
