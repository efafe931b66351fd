"""Pairs with codecs on real vLLM servers, through the router. On the CPU, over loopback."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("vllm")

from helpers import first_last, make_plan, tiny_model
from pdtrim.engines.vllm.coded import TICKET
from pdtrim.engines.vllm.pages import page_bytes, pages_sent
from pdtrim.engines.vllm.staging import Form
from pdtrim.export import export, load_pair
from pdtrim.kv.codecs import parse_codec
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.models.loading import load_model
from pdtrim.plan import LayerKV
from pdtrim.stage.forward import Batch, forward
from test_vllm_serving import BLOCK, GATES, LENGTHS, idle, prompt_of, tokens_of
from vllm_servers import commands, completion, post, prefill, running, until

pytestmark = pytest.mark.slow

PROMPTS = (1, *LENGTHS)
TIE = 0.05
"""Nats between the simulator's first two: rounding that flips a code may swap what is nearer."""


@pytest.fixture(scope="module", params=["int4:group=32,recent=8", "entropy"])
def pair(request, tmp_path_factory, tiny_folder):
    """Every kind of gate; two layers trimmed, one raw."""
    folder = tmp_path_factory.mktemp("coded")
    made = tiny_model(
        "qwen3",
        layers=8,
        vocab_size=64,
        hidden_size=128,
        intermediate_size=96,
        head_dim=32,
        max_position_embeddings=1024,
    )
    made.network.save_pretrained(folder / "m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_folder / name, folder / "m")
    codec = parse_codec(request.param)
    kv = [LayerKV(codec=codec) for _ in range(8)]
    for layer in (1, 4):
        kv[layer] = LayerKV(selector=first_last(20, 50).selector, codec=codec)
    kv[2] = LayerKV()
    model = load_model(str(folder / "m"), dtype="float32")
    return export(make_plan(model, GATES, tuple(kv), block_size=BLOCK), model, folder / "pair")


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
        made = list(pool.map(lambda n: post(router.url, completion(prompt_of(n))), PROMPTS))
    tokens = {n: tokens_of(answer) for n, answer in zip(PROMPTS, made, strict=True)}
    assert all(agrees(simulated, prompt_of(n), tokens[n]) for n in PROMPTS)
    whole = HandoverPolicy.full(8)
    assert not all(agrees(simulated, prompt_of(n), tokens[n], whole) for n in PROMPTS)
    until(lambda: decode.metric("pdtrim:handover_seconds_count") == len(PROMPTS))
    forms = [Form.of(plan, torch.float32, n, BLOCK) for n in PROMPTS]
    most = sum(form.most for form in forms)
    sent = decode.metric("vllm:nixl_bytes_transferred_sum")
    assert sent == most if forms[0].exact else sent < most
    assert sent == decode.metric("pdtrim:kv_bytes_sent_total")
    assert decode.metric("vllm:nixl_num_descriptors_sum") == len(PROMPTS)
    raw = sum(pages_sent(plan, n, BLOCK) for n in PROMPTS) * page_bytes(plan, BLOCK, 4)
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
