"""The pair on real vLLM servers: tokens, bytes, refusals, faults. On the CPU, over loopback.

The order matters where servers are killed: those tests come last.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm")

from helpers import export, first_last, make_plan
from pdtrim.engines.config import ServeConfig
from pdtrim.engines.pages import bytes_sent, page_bytes
from pdtrim.engines.ports import free_port
from pdtrim.engines.vllm.launch import processes
from pdtrim.exported import load_pair
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.plan import Gates, LayerKV
from pdtrim.stage.forward import Batch, forward
from vllm_servers import (
    ARGS,
    BLOCK,
    DTYPE,
    ENV,
    LENGTHS,
    RULE,
    agree,
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


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tiny_folder):
    """Two layers trimmed."""
    kv = (RULE if layer in (1, 4) else LayerKV() for layer in range(8))
    return tiny_pair(tmp_path_factory.mktemp("vllm"), tiny_folder, kv)


@pytest.fixture(scope="module")
def simulated(pair):
    return load_pair(pair)


@pytest.fixture(scope="module")
def servers(pair, tmp_path_factory):
    """Prefill, two decodes, router."""
    with running(commands(pair, decode_replicas=2), tmp_path_factory.mktemp("log")) as started:
        yield started


def test_tokens_are_the_simulators_and_bytes_the_plans(servers, simulated):
    """Through the router, eight at once."""
    _, *decodes, router = servers
    _, plan = simulated
    before = [d.metric("vllm:nixl_bytes_transferred_sum") for d in decodes]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda n: post(router.url, completion(prompt_of(n))), LENGTHS))
    wrong = [
        n
        for n, answer in zip(LENGTHS, made, strict=True)
        if not agree(simulated, prompt_of(n), tokens_of(answer))
    ]
    assert not wrong
    planned = sum(bytes_sent(plan, n, BLOCK, DTYPE.itemsize) for n in LENGTHS)
    until(lambda: sum(d.metric("pdtrim:handover_seconds_count") for d in decodes) >= len(LENGTHS))
    sent = sum(d.metric("vllm:nixl_bytes_transferred_sum") for d in decodes) - sum(before)
    assert sent == planned == sum(d.metric("pdtrim:kv_bytes_sent_total") for d in decodes)
    whole = sum(-(-n // BLOCK) for n in LENGTHS) * len(plan.sent_layers)
    page = page_bytes(plan, 0, BLOCK, DTYPE.itemsize)
    skipped = sum(d.metric("pdtrim:kv_bytes_skipped_total", reason="token") for d in decodes)
    assert skipped == whole * page - planned > 0
    until(lambda: idle(*servers[:-1]))


def test_fused_projections_are_served_and_prefixes_shared(tmp_path, tiny_folder):
    """Phi-3, with every kind of gate: keys and values alone are rows of the fused matrix.

    Nothing is dropped or coded, so decode keeps pages of prompts for those that begin alike. Of an
    answer it keeps none: in the next prompt prefill computes those tokens, with other blocks.
    """
    kv = (LayerKV() for layer in range(8))
    pair = tiny_pair(tmp_path, tiny_folder, kv, "phi3", sliding_window=None)
    simulated = load_pair(pair)
    page = page_bytes(simulated[1], 0, BLOCK, DTYPE.itemsize) * 7  # the layers that decode runs
    few = ("--num-gpu-blocks-override", str(1024 // BLOCK + 1))
    with running(commands(pair, decode_args=(*ARGS, *few)), tmp_path) as (source, decode, router):

        def arrive(pages):
            until(lambda: decode.metric("pdtrim:kv_bytes_sent_total") == pages * page)

        prompt, pages = prompt_of(200, 5), 7
        for shared in (192, 320):  # what was handed over before, in whole pages
            answer = tokens_of(post(router.url, completion(prompt, 80)))
            assert agree(simulated, prompt, answer)
            arrive(pages)
            found = source.metric("vllm:prefix_cache_hits_total")
            prompt = [*prompt, *answer, *prompt_of(50, shared)]
            pages += len(prompt) // BLOCK + 1 - shared // BLOCK
        assert found == 192
        assert agree(simulated, prompt, tokens_of(post(router.url, completion(prompt, 80))))
        arrive(pages)
        assert decode.metric("vllm:prefix_cache_hits_total") == 192 + 320
        refill(simulated, source, decode, router)
        until(lambda: idle(source, decode))


def test_the_trimmed_pages_change_what_is_said(simulated):
    """Or the test above could not fail: without the holes other tokens come."""
    pair, plan = simulated
    batch = Batch(
        prompt_BP=torch.tensor([prompt_of(300)]), continuation_BC=torch.tensor([[5, 6, 7]])
    )
    with torch.no_grad():
        cut = forward(pair, batch, plan.gates, HandoverPolicy.of(plan))
        whole = forward(pair, batch, plan.gates, HandoverPolicy.full(8))
    assert (cut - whole).abs().max() > 0.1


def test_memory_is_saved_in_the_hole(servers):
    """Two trimmed layers and five whole ones are groups of two: three tables whole, one trimmed."""
    first, decode, *_ = servers
    request_id, body = prefill(first, completion(prompt_of(600), 400))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, decode.url, body, request_id=request_id)
        used = until(lambda: decode.used)
        assert answer.result()[0] == 200
    held = round(used * (decode.pages - 1))  # one is the null block
    dropped = (600 - 1 - 50) // BLOCK - 1
    assert held in [4 * pages - dropped for pages in range(600 // BLOCK, 1000 // BLOCK + 2)]


def test_a_stream_says_the_same(servers):
    router = servers[-1]
    body = completion(prompt_of(70), stream=True)
    request = urllib.request.Request(
        f"{router.url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        lines = [line.decode().removeprefix("data: ").strip() for line in answer]
    parts = [json.loads(line) for line in lines if line and line != "[DONE]"]
    streamed = [t for part in parts for c in part["choices"] for t in c["token_ids"]]
    assert streamed == tokens_of(post(router.url, completion(prompt_of(70))))


def test_only_handovers_are_served(servers):
    first, second, *_ = servers
    refused = second.metric("pdtrim:refused_requests_total")
    for server, words in ((first, "only prefills"), (second, "without a handover")):
        assert post(server.url, completion(prompt_of(40)))[0] == 500
        assert words in server.log.read_text()
    changes = {
        "prefill ran 5 tokens of a prompt of 77": {"remote_num_tokens": 5},
        "does not fill 1 pages": {"remote_block_ids": [[1]]},
        "not one list of page numbers": {"remote_block_ids": [["1"]]},
        "lack remote_host": {"remote_host": None},
    }
    for words, change in changes.items():
        request_id, body = prefill(first, completion(prompt_of(77)))
        body["kv_transfer_params"] |= change
        assert post(second.url, body, request_id=request_id)[0] == 500
        assert words in second.log.read_text()
    nowhere = {"kv_transfer_params": {"do_remote_prefill": True}}
    assert post(second.url, completion(prompt_of(40)) | nowhere)[0] == 500
    until(lambda: second.metric("pdtrim:refused_requests_total") == refused + 2 + len(changes))
    assert second.healthy()
    until(lambda: idle(first, second))
    assert second.metric("pdtrim:local_prefill_requests_total") == 0


def test_aborts_leak_nothing(servers):
    """200 requests, many of whose clients go away in prefill, in the handover or in decode."""
    router = servers[-1]
    rng = random.Random(0)

    def one(number):
        body = completion(prompt_of(rng.randint(2, 400), number), rng.randint(1, 24))
        patience = rng.choice((0.02, 0.1, 0.3, 120, 120))
        try:
            return post(router.url, body, timeout=patience)[0]
        except OSError:
            return None  # the client went

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, range(200)))
    assert found.count(200) > 40 and found.count(None) > 20
    until(lambda: idle(*servers[:-1]))
    assert post(router.url, completion(prompt_of(99)))[0] == 200


@pytest.fixture(scope="module")
def smollm2_pair(smollm2, tmp_path_factory):
    gates = Gates.removing(30, prefill=range(18, 28), decode={7}).without_dead_work()
    kv = tuple(first_last(32, 64) if layer % 3 == 0 else LayerKV() for layer in range(30))
    folder = tmp_path_factory.mktemp("real") / "pair"
    return export(make_plan(smollm2, gates, kv, block_size=BLOCK), smollm2, folder)


def test_the_verb_serves_smollm2_and_leaves_nothing(smollm2_pair, servers, tmp_path):
    """``pdtrim serve`` whole: completion, chat, a foreign decode, Ctrl-C."""
    port = free_port()
    words = ["serve", str(smollm2_pair), "--port", str(port), "--name", "m"]
    words += ["--max-model-len", "1024"]
    words += [f"--{stage}-arg={arg}" for stage in ("prefill", "decode") for arg in ARGS]
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        popen = subprocess.Popen(
            [sys.executable, "-m", "pdtrim.cli", *words],
            env={**os.environ, **ENV},
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        until(lambda: "OpenAI endpoint" in (tmp_path / "out").read_text(), seconds=400)
        real = load_pair(smollm2_pair)
        tokenizer = real[0].decode.need_tokenizer()
        text = "The lighthouse keeper climbed the stairs and lit the lamp. " * 12
        for prompt in (text[:200], text):
            ids = tokenizer(prompt).input_ids
            assert agree(real, ids, tokens_of(post(url, completion(ids, 12))))
        chat = [{"role": "user", "content": "What is the capital of France?"}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        body = {k: v for k, v in completion(None, 12).items() if k != "prompt"}
        status, said = post(url, {**body, "messages": chat}, path="/v1/chat/completions")
        assert status == 200
        told = tokens_of(post(url, completion(ids, 12)))
        assert agree(real, ids, told)
        assert said["choices"][0]["message"]["content"] == tokenizer.decode(
            told, skip_special_tokens=True
        )
        said = (tmp_path / "err").read_text()
        assert "\nlink: " in said and " of the longest requests (1,024 tokens, 96 pages" in said
        refuse_a_foreign_partner(tmp_path / "err", servers[1])
        children = group_members(popen.pid)
        os.kill(popen.pid, signal.SIGINT)
        assert popen.wait(60) == 0
        assert "stopped" in (tmp_path / "err").read_text()
        assert children
        until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in children), seconds=20)
    finally:
        popen.kill()


def refuse_a_foreign_partner(log, decode):
    """A decode server of another plan will not read this prefill's pages, and says why."""
    (line,) = [x for x in log.read_text().splitlines() if "prefill 0 |" in x and "http://" in x][:1]
    url = "http://" + line.split("http://")[1].split()[0]
    prefiller = replace(decode, process=replace(decode.process, url=url))
    request_id, body = prefill(prefiller, completion(prompt_of(40)))
    assert post(decode.url, body, request_id=request_id)[0] == 500
    assert decode.log.read_text().count("Local: pdtrim/5 plan") >= 1
    until(lambda: idle(decode))


def group_members(pid):
    """Every process below one."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/stat") as file:
                parents[int(entry)] = int(file.read().rsplit(")", 1)[1].split()[1])
    found, todo = set(), [pid]
    while todo:
        below = {child for child, parent in parents.items() if parent in todo}
        todo = list(below - found)
        found |= below
    return found


def test_a_dead_decode_frees_prefills_pages(servers):
    first, _, second, router = servers
    held = [prefill(first, completion(prompt_of(n), 800)) for n in (100, 200)]
    request_id, body = held[0]
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, second.url, body, request_id=request_id)
        until(lambda: second.used > 0)
        second.kill()
        with pytest.raises(OSError):
            answer.result()
    until(lambda: idle(first))  # the second prompt's lease runs out
    assert first.healthy()
    assert any(post(router.url, completion(prompt_of(50)))[0] == 200 for _ in range(4))


def test_a_dead_prefill_fails_its_requests_only(servers):
    first, decode, *_ = servers
    before = prefill(first, completion(prompt_of(120)))
    fresh = [prefill(first, completion(prompt_of(n, 7), 64)) for n in (300, 400, 500)]
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(post, decode.url, body, request_id=i) for i, body in fresh]
        first.kill()
        assert {answer.result()[0] for answer in answers} <= {200, 500}
    request_id, body = before
    assert post(decode.url, body, request_id=request_id)[0] == 500
    assert decode.healthy()
    until(lambda: idle(decode))


def test_a_server_of_the_wrong_settings_does_not_start(pair):
    config = ServeConfig(
        pair=pair, decode_args=(*ARGS, "--enable-prefix-caching"), max_model_len=512
    )
    made = processes(config, free_port=free_port)[1]
    done = subprocess.run(
        made.command,
        env={**os.environ, **made.env, **ENV},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    assert "prefix caching on decode under a plan that drops" in done.stdout + done.stderr
