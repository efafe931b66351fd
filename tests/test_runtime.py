"""Two real processes against the simulator."""

import itertools
import random
import socket

import pytest
import torch
from safetensors.torch import load_file

from helpers import export, first_last, make_plan, random_batch, random_gates, tiny_model
from pdtrim.errors import RuntimeFailure
from pdtrim.exported import load_pair
from pdtrim.kv.frame import Layout
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.plan import Gates, LayerKV
from pdtrim.runtime.decode import DecodeProcess
from pdtrim.runtime.prefill import PrefillProcess
from pdtrim.runtime.session import Session
from pdtrim.stage.forward import Batch, Pair, forward
from pdtrim.stage.sampling import Sampling

pytestmark = pytest.mark.usefixtures("warm_stages")


class Events:
    """Stands in for the control pipe where both stages run inside the test."""

    def __init__(self):
        self.last = None

    def send(self, event, **fields):
        self.last = {"event": event, **fields}

    def check(self):
        pass


def every_state_of_a_layer():
    for attention, mlp, decodes, decode_mlp in itertools.product(
        ("full", "kv", "off"), (True, False), (True, False), (True, False)
    ):
        if not (decodes and attention == "off"):
            yield attention, mlp, decodes, decode_mlp


def through_the_socket(plan, pair, batch, tmp_path):
    """Logits by the stages' own code and a real socket, without the cost of new processes."""
    prefill = PrefillProcess(Events(), pair.prefill, plan)
    decode = DecodeProcess(Events(), pair.decode, plan)
    for stage, end in zip((prefill, decode.receiver), socket.socketpair(), strict=True):
        stage.attach(end)
    requests = [
        {"id": f"{row:032x}", "tokens": len(prompt) - 1, "last": prompt[-1]}
        for row, prompt in enumerate(batch.prompt_BP.tolist())
    ]
    decode.expect({"requests": requests})
    prompts = [
        {"id": r["id"], "tokens": p[:-1]}
        for r, p in zip(requests, batch.prompt_BP.tolist(), strict=True)
    ]
    prefill.prefill({"requests": prompts, "overlap": True})
    file = str(tmp_path / "logits.safetensors")
    continuation = batch.continuation_BC.tolist()
    decode.score({"requests": requests, "continuation": continuation, "file": file})
    prefill.close()
    decode.receiver.close()
    return load_file(file)["logits"]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_gate_state_of_two_blocks_equals_the_simulator(family, tmp_path):
    model = tiny_model(family, layers=2)
    batch = random_batch(model, prompt=7, new=4)
    rng = random.Random(0)
    states = list(itertools.product(every_state_of_a_layer(), repeat=2))
    assert len(states) == 400
    for state in states:
        gates = Gates(
            prefill_attention=tuple(s[0] for s in state),
            prefill_mlp=tuple(s[1] for s in state),
            decode_attention=tuple(s[2] for s in state),
            decode_mlp=tuple(s[3] for s in state),
        )
        kv = tuple(rng.choice((LayerKV(), first_last(1, 2))) for _ in "ab")
        plan = make_plan(model, gates, kv)
        pair = Pair.dense(model)
        with torch.no_grad():
            simulated = forward(pair, batch, gates, HandoverPolicy.of(plan))
        real = through_the_socket(plan, pair, batch, tmp_path)
        torch.testing.assert_close(real, simulated, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "phi3"])
def test_two_processes_equal_the_simulator(family, tmp_path):
    model = tiny_model(family)
    gates, cut = random_gates(4, random.Random(9)), first_last(2, 3)
    assert gates.prefill_attention == ("full", "kv", "kv", "off")
    plan = make_plan(model, gates, (cut, LayerKV(), cut, LayerKV()))
    folder = export(plan, model, tmp_path / "pair")
    batch = random_batch(model, rows=3, prompt=14, new=5)
    pair, _ = load_pair(folder)
    with torch.no_grad():
        simulated = forward(pair, batch, gates, HandoverPolicy.of(plan))
    with Session(folder) as session:
        torch.testing.assert_close(session.score(batch), simulated, atol=1e-4, rtol=0)
        assert session.kv_bytes == [Layout.of(plan, torch.float32, 13).frame_bytes] * 3


def greedy_by_simulator(pair, plan, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        batch = Batch(
            prompt_BP=torch.tensor([prompt]),
            continuation_BC=torch.tensor([[*tokens[len(prompt) :], 0]]),
        )
        with torch.no_grad():
            logits = forward(pair, batch, plan.gates, HandoverPolicy.of(plan))
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    model = tiny_model("llama", eos_token_id=None)
    cut = first_last(2, 3)
    plan = make_plan(
        model, Gates.removing(4, prefill={1}, decode={2}), (cut, LayerKV(), LayerKV(), cut)
    )
    folder = export(plan, model, tmp_path_factory.mktemp("pair") / "pair")
    with Session(folder) as session:
        yield session, load_pair(folder)[0], plan


PROMPTS = [[5], [9, 3], [7, 1, 4], list(range(3, 20)), [50, 2, 8, 60, 33, 21, 17], [11] * 6]


def test_a_batch_of_any_lengths_generates_what_each_prompt_does_alone(running):
    session, pair, plan = running
    together = session.generate(PROMPTS, max_new_tokens=8)
    for prompt, result in zip(PROMPTS, together, strict=True):
        assert result.tokens == greedy_by_simulator(pair, plan, prompt, 8)
        assert result.kv_bytes == Layout.of(plan, torch.float32, len(prompt) - 1).frame_bytes


def test_sampling_depends_on_the_seed_and_not_on_the_batch(running):
    session, _, _ = running
    hot = Sampling(temperature=2.0, top_p=0.9, seed=3)
    first = session.generate(PROMPTS[2:], max_new_tokens=12, sampling=hot)
    again = session.generate(PROMPTS[2:], max_new_tokens=12, sampling=hot)
    alone = session.generate(PROMPTS[2:3], max_new_tokens=12, sampling=hot)
    other = session.generate(
        PROMPTS[2:], max_new_tokens=12, sampling=Sampling(temperature=2.0, top_p=0.9, seed=4)
    )
    tokens = [[r.tokens for r in results] for results in (first, again, other)]
    assert tokens[0] == tokens[1] != tokens[2]
    assert alone[0].tokens == first[0].tokens


def test_a_stop_token_ends_its_own_prompt_only(running):
    session, _, _ = running
    free = session.generate(PROMPTS, max_new_tokens=10)
    stop = free[3].tokens[4]
    stopped = session.generate(PROMPTS, max_new_tokens=10, stop_ids=[stop])
    for before, after in zip(free, stopped, strict=True):
        expected = before.tokens
        if stop in expected:
            expected = expected[: expected.index(stop) + 1]
        assert after.tokens == expected
        assert after.stopped == (stop in before.tokens)
    assert len({len(r.tokens) for r in stopped}) > 1


def test_frames_of_a_wrong_prefill_are_refused_and_both_processes_stay_up(running, tmp_path):
    session, _, _ = running
    model = tiny_model("llama", eos_token_id=None)
    other = export(make_plan(model, Gates.removing(4, prefill={0})), model, tmp_path / "other")
    request = {"id": "ab" * 16, "tokens": 2, "last": 3}
    with Session(other) as stranger:
        for announced, words in (([], "no such request"), ([request], "does not match this side")):
            # its prefill now talks to the wrong decode
            for stage, end in zip(
                (stranger.prefill, session.decode), socket.socketpair(), strict=True
            ):
                stage.event(stage.order("link", give=end, transport="socket"))
            session.decode.event(session.decode.order("expect", requests=announced))
            prompts = [{"id": request["id"], "tokens": [1, 2]}]
            number = stranger.prefill.order("prefill", requests=prompts, overlap=True)
            with pytest.raises(RuntimeFailure, match=words):
                stranger.prefill.event(number)
        assert [s.process.poll() for s in (stranger.prefill, session.decode)] == [None, None]
    session._linked = False
    assert session.generate([[5, 6]], max_new_tokens=3)[0].tokens
