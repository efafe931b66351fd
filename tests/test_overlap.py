"""The handover beside prefill: what is under way when, and what happens if it breaks there."""

import socket
import threading

import pytest
import torch

from helpers import export, make_plan, tiny_model
from pdtrim.errors import PdtrimError, WireError
from pdtrim.kv.codecs import parse_codec
from pdtrim.kv.frame import Layout
from pdtrim.kv.selectors.snapkv import SnapKV
from pdtrim.kv.wire import send_answer
from pdtrim.plan import Gates, LayerKV
from pdtrim.runtime import sender
from pdtrim.runtime.line import DEPTH, Line
from pdtrim.runtime.prefill import PrefillProcess
from pdtrim.runtime.receiver import Receiver
from pdtrim.runtime.session import Session
from pdtrim.stage import generate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IDS = [bytes([n]) * 16 for n in range(3)]
PROMPTS = [[5, 9, 3, 7, 1, 4], [11] * 40, []]
RULES = (
    LayerKV(),
    LayerKV(codec=parse_codec("entropy")),
    LayerKV(selector=SnapKV(share=0.5), codec=parse_codec("lossless")),
    LayerKV(codec=parse_codec("int4")),
)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", eos_token_id=None)


@pytest.fixture(scope="module")
def plan(model):
    return make_plan(model, Gates.dense(4), RULES)


@pytest.fixture
def stages(plan):
    """On a GPU, where there is one, with the streams and the pinned memory of one."""
    model = tiny_model("llama", eos_token_id=None)
    model.network.to(DEVICE)
    prefill, receiver = PrefillProcess(None, model, plan), Receiver(plan, model.dtype)
    for stage, end in zip((prefill, receiver), socket.socketpair(), strict=True):
        stage.attach(end)
    yield prefill, receiver
    prefill.close()
    receiver.close()


def handed_over(stages, *, overlap):
    """What decode holds of a batch, and the bytes of each request."""
    prefill, receiver = stages
    for request, tokens in zip(IDS, PROMPTS, strict=True):
        receiver.expect(request, len(tokens))
    sent = prefill.run(IDS, PROMPTS, overlap=overlap).sent
    arrived = [receiver.take(request) for request in IDS]
    assert sent == [one.frame_bytes for one in arrived]
    return arrived


def test_a_batch_of_any_lengths_arrives_as_it_does_behind_prefill(stages, plan, model):
    beside, behind = (handed_over(stages, overlap=overlap) for overlap in (True, False))
    for one, two, tokens in zip(beside, behind, PROMPTS, strict=True):
        assert one.frame_bytes == two.frame_bytes
        assert one.frame_bytes <= Layout.of(plan, model.dtype, len(tokens)).frame_bytes
        assert list(one.layers) == list(two.layers) == [0, 1, 2, 3]
        for layer, sent in one.layers.items():
            other = two.layers[layer]
            assert sent.keep_GN.equal(other.keep_GN)
            for a, b in zip(sent.groups, other.groups, strict=True):
                assert a.heads == b.heads and a.positions_BgM.equal(b.positions_BgM)
                assert a.k_BgMD.equal(b.k_BgMD) and a.v_BgMD.equal(b.v_BgMD)


def test_decode_has_a_layer_before_prefill_computes_the_last(stages, monkeypatch):
    """Prefill's last layer waits here until decode has decoded the first."""
    from pdtrim.kv import wire

    decoded, run, decode_groups = threading.Event(), generate.prefill, wire.decode_groups

    def noted(entry, *rest):
        groups = decode_groups(entry, *rest)
        decoded.set()
        return groups

    def waits(*arguments):
        for layer, view in run(*arguments):
            if layer == 3:
                assert decoded.wait(20), "nothing had come"
            yield layer, view

    monkeypatch.setattr(wire, "decode_groups", noted)
    monkeypatch.setattr(generate, "prefill", waits)
    handed_over(stages, overlap=True)
    decoded.clear()
    with pytest.raises(AssertionError, match="nothing had come"):
        monkeypatch.setattr(decoded, "wait", lambda seconds: decoded.is_set())
        handed_over(stages, overlap=False)


@pytest.mark.parametrize(
    "answer, words",
    [(None, "the handover to decode broke: "), ("no room", "decode refused the handover: no room")],
)
def test_a_full_socket_holds_prefill_up_and_an_end_of_it_lets_go(model, plan, answer, words):
    """Nobody reads: layers wait in short queues, and a peer that goes away is one clear line."""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    prefill = PrefillProcess(None, model, plan)
    prefill.attach(ours)
    said = []

    def run():
        try:
            prefill.run(IDS[:1], [[7] * 500])
        except WireError as error:
            said.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    assert theirs.recv(8) == b"PDTRIMKV"
    if answer:
        send_answer(theirs, answer)
    theirs.close()
    thread.join(20)
    assert not thread.is_alive()
    assert len(said) == 1 and said[0].startswith(words)
    assert prefill.stream is None


def test_what_decode_says_reaches_a_prefill_that_still_sends(model, plan):
    """Decode refuses a head, waits for no more of the frame, and goes."""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    receiver = Receiver(plan, model.dtype)
    prefill = PrefillProcess(None, model, plan)
    prefill.attach(ours)
    receiver.attach(theirs)
    with pytest.raises(WireError, match="decode refused the handover: no such request"):
        prefill.run(IDS[:1], [[7] * 500])
    assert prefill.stream is None


def test_a_step_that_fails_is_its_own_error_and_leaves_nobody_waiting():
    started = threading.Event()

    def step(number):
        if number == 1:
            started.set()
            raise KeyError("one")

    line = Line(step)
    with pytest.raises(KeyError, match="one"):
        for number in range(10 * DEPTH):
            line.put(number)
            if number == 1:
                assert started.wait(20)
        line.finish()
    line.drop()
    with pytest.raises(KeyError, match="one"):
        line.finish()


def test_an_error_of_the_encoder_is_one_line_and_the_next_prompt_works(stages, monkeypatch):
    prefill, receiver = stages
    encode = sender.encode_part

    def fails(entry, sent):
        if entry.layer == 2:
            raise PdtrimError("layer 2: a code that fails")
        return encode(entry, sent)

    with monkeypatch.context() as patched:
        patched.setattr(sender, "encode_part", fails)
        with pytest.raises(PdtrimError, match="layer 2: a code that fails"):
            handed_over(stages, overlap=True)
    assert prefill.stream is None and not receiver.arrived
    for stage, end in zip(stages, socket.socketpair(), strict=True):
        stage.attach(end)
    assert len(handed_over(stages, overlap=True)) == len(IDS)


@pytest.mark.usefixtures("warm_stages")
def test_generations_name_their_exposed_handover_and_are_equal_both_ways(model, plan, tmp_path):
    folder = export(plan, model, tmp_path / "pair")
    prompts = [[*tokens, 8] for tokens in PROMPTS]
    made = []
    with Session(folder, overlap=False) as session:
        assert not session.overlap
        for overlap in (False, True):
            session.overlap = overlap
            made.append(session.generate(prompts, max_new_tokens=8))
            exposed = session.timing.exposed_handover
            assert {one.exposed_handover for one in made[-1]} == {exposed}
            assert exposed >= session.timing.handover_s > 0
    assert [one.tokens for one in made[0]] == [one.tokens for one in made[1]]
    assert [one.kv_bytes for one in made[0]] == [one.kv_bytes for one in made[1]]


def test_pairs_that_no_codec_holds_are_refused_in_the_middle_of_a_prompt():
    model = tiny_model("llama", eos_token_id=None)
    rules = (LayerKV(),) * 2 + (LayerKV(codec=parse_codec("int4")),) * 2
    plan = make_plan(model, Gates.dense(4), rules)
    with torch.no_grad():
        model.block(2).attention.k_proj.weight.fill_(3e38)
    prefill, (ours, theirs) = PrefillProcess(None, model, plan), socket.socketpair()
    prefill.attach(ours)
    with theirs, pytest.raises(PdtrimError, match="layer 2"):
        prefill.run(IDS[:1], [[5, 6, 7]])
    assert prefill.stream is None
