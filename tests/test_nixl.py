"""The handover by NIXL, out of prefill's memory: the same pairs, and what happens if it breaks."""

import itertools
import socket
import sys
from dataclasses import replace

import pytest
import torch

from helpers import export, make_plan, tiny_model
from pdtrim.errors import PdtrimError, RuntimeFailure, WireError
from pdtrim.exported import load_pair
from pdtrim.kv import wire
from pdtrim.kv.frame import ENTRY, Layout
from pdtrim.plan import Gates
from pdtrim.runtime import config as runtime_config
from pdtrim.runtime import decode, prefill, sender
from pdtrim.runtime.config import RuntimeConfig
from pdtrim.runtime.prefill import PrefillProcess
from pdtrim.runtime.process import Patience, StageProcess
from pdtrim.runtime.receiver import Receiver
from pdtrim.runtime.session import Session
from pdtrim.runtime.shelf import Shelf
from pdtrim.runtime.slots import ALIGN, SLOTS, Slots
from test_overlap import DEVICE, IDS, PROMPTS, RULES
from test_runtime import greedy_by_simulator

pytest.importorskip("nixl")

LAYERS = 2 * SLOTS  # the ring goes round twice


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", layers=LAYERS, eos_token_id=None)


@pytest.fixture(scope="module")
def plan(model):
    return make_plan(model, Gates.dense(LAYERS), RULES * (LAYERS // 4))


@pytest.fixture(scope="module")
def agents(model, plan):
    """Both stages in this process, with an agent each."""
    model.network.to(DEVICE)
    prefill, receiver = (
        PrefillProcess(None, model, plan),
        Receiver(plan, model.dtype, model.device),
    )
    yield prefill, receiver
    prefill.close()
    receiver.close()


@pytest.fixture
def stages(agents):
    linked(agents, "nixl")
    return agents


def linked(agents, way):
    """A new stream, as after a failure."""
    for stage, end in zip(agents, socket.socketpair(), strict=True):
        stage.attach(end, way)


def handed_over(stages, prompts=PROMPTS):
    prefill, receiver = stages
    for request, tokens in zip(IDS, prompts, strict=True):
        receiver.expect(request, len(tokens))
    sent = prefill.run(IDS, prompts).sent
    arrived = [receiver.take(request) for request in IDS]
    assert sent == [one.frame_bytes for one in arrived]
    return arrived


def same(some, others):
    for one, two in zip(some, others, strict=True):
        assert list(one.layers) == list(two.layers) == list(range(LAYERS))
        for layer, sent in one.layers.items():
            assert sent.keep_GN.equal(two.layers[layer].keep_GN)
            for a, b in zip(sent.groups, two.layers[layer].groups, strict=True):
                assert a.heads == b.heads and a.positions_BgM.equal(b.positions_BgM)
                assert a.k_BgMD.equal(b.k_BgMD) and a.v_BgMD.equal(b.v_BgMD)


def test_what_decode_reads_is_what_the_socket_brings_also_where_the_ring_grows(agents):
    linked(agents, "socket")
    wanted = handed_over(agents)
    longer = [[7] * 300, *PROMPTS[1:]]
    wanted_longer = handed_over(agents, longer)
    linked(agents, "nixl")
    for _ in range(2):
        same(handed_over(agents), wanted)
    same(handed_over(agents, longer), wanted_longer)
    same(handed_over(agents), wanted)


def test_places_are_apart_whole_words_and_as_long_as_the_plan_allows(plan, model):
    layouts = [Layout.of(plan, model.dtype, tokens) for tokens in (6, 40, 0, 7)]
    slots = Slots.of(layouts)
    for at in range(LAYERS):
        ends = [at % SLOTS * slots.size]
        for row, layout in enumerate(layouts):
            start = slots.start(at, row)
            assert start >= ends[-1] and start % ALIGN == 0
            ends.append(start + wire.in_words(layout.entries[at].data_bytes))
        assert ends[-1] <= (at % SLOTS + 1) * slots.size <= slots.nbytes


def test_a_slot_is_used_again_only_when_its_layer_was_read(stages, monkeypatch):
    seen, lay, wait = [], Shelf.lay, sender.wait_for_read

    def noted(self, start, pieces):
        seen.append("laid")
        return lay(self, start, pieces)

    def waited(link):
        wait(link)
        seen.append("read")

    monkeypatch.setattr(Shelf, "lay", noted)
    monkeypatch.setattr(sender, "wait_for_read", waited)
    handed_over(stages)
    laid = [at for at, what in enumerate(seen) if what == "laid"]
    assert len(laid) == LAYERS * len(IDS)
    for layer, at in enumerate(laid[:: len(IDS)]):
        assert seen[:at].count("read") == max(0, layer - SLOTS + 1)


def test_bytes_that_changed_behind_their_checksum_are_refused_and_the_next_batch_works(
    stages, monkeypatch
):
    lay = Shelf.lay

    def damaged(self, start, pieces):
        said = lay(self, start, pieces)
        if said[0] and start == 0:  # the first request's part of a layer in the first slot
            self._ring.memory[said[0] // 2] ^= 4
        return said

    with monkeypatch.context() as patched:
        patched.setattr(Shelf, "lay", damaged)
        with pytest.raises(WireError, match="layer 0: its checksum does not fit the bytes"):
            handed_over(stages)
    assert stages[0].stream is None and not stages[1].arrived
    linked(stages, "nixl")
    handed_over(stages)


def test_a_prefill_that_goes_in_the_middle_of_a_batch_leaves_decode_usable(stages, monkeypatch):
    laid = sender.Sender._laid

    def gone(self, shelf, at, kept):
        if at == SLOTS + 1:
            raise OSError("it is gone")
        return laid(self, shelf, at, kept)

    with monkeypatch.context() as patched:
        patched.setattr(sender.Sender, "_laid", gone)
        with pytest.raises(WireError, match="the handover to decode broke: it is gone"):
            handed_over(stages)
    assert not stages[1].arrived
    linked(stages, "nixl")
    handed_over(stages)


@pytest.mark.parametrize("layer, words", [(3, "bytes sent, .* expected"), (1, "at most")])
def test_a_size_beyond_the_plan_is_refused_before_anything_is_read(
    stages, monkeypatch, layer, words
):
    describe, fetched = sender.describe, []
    fetch = stages[1]._fetcher.fetch

    def lies(entry, sent, size):
        described = describe(entry, sent, size)
        if entry.layer == layer:
            raw = ENTRY.pack(layer, entry.mask_bytes, entry.data_bytes + 8)
            described[0] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        return described

    monkeypatch.setattr(sender, "describe", lies)
    monkeypatch.setattr(
        stages[1]._fetcher, "fetch", lambda at, sizes: (fetched.append(at), fetch(at, sizes))[1]
    )
    with pytest.raises(WireError, match=f"layer {layer}: .*{words}"):
        handed_over(stages)
    assert fetched == list(range(layer))


@pytest.mark.parametrize("wrong", [{"metadata": b"nothing"}, {"address": 4096}])
def test_memory_that_prefill_does_not_have_is_one_line_and_the_next_batch_works(
    stages, monkeypatch, wrong
):
    fit = Shelf.fit

    def lies(self, slots):
        return replace(fit(self, slots), **wrong)

    with monkeypatch.context() as patched:
        patched.setattr(Shelf, "fit", lies)
        with pytest.raises(WireError, match="decode refused the handover: NIXL cannot re"):
            handed_over(stages)
    linked(stages, "nixl")
    handed_over(stages)


def test_two_processes_answer_as_by_socket_and_decode_outlives_a_killed_prefill(tmp_path):
    model = tiny_model("llama", eos_token_id=None)
    plan = make_plan(model, Gates.dense(4), RULES)
    folder = export(plan, model, tmp_path / "pair")
    prompts = [[*tokens, 8] for tokens in PROMPTS]
    pair, _ = load_pair(folder)
    wanted = [greedy_by_simulator(pair, plan, prompt, 6) for prompt in prompts]
    with Session(folder, RuntimeConfig(transport="nixl")) as session:
        made = session.generate(prompts, max_new_tokens=6)
        assert [one.tokens for one in made] == wanted
        assert {one.transport for one in made} == {session.timing.transport} == {"nixl"}
        around = ENTRY.size + wire.HASH_BYTES + wire.CHECKSUM.size
        assert made[2].kv_bytes >= wire.HEAD.size + 4 * around
        assert made[1].kv_bytes > made[2].kv_bytes + 40 * 2 * 2 * 8 * 4  # a raw layer alone
        session.prefill.process.kill()
        with pytest.raises(RuntimeFailure, match="prefill process ended"):
            session.generate(prompts, max_new_tokens=6)
        decode_pid = session.decode.process.pid
        other = StageProcess("prefill", folder / "prefill", Patience())
        other.event(0)
        session.prefill.close()
        session.prefill = session._stages[0] = other
        session.way = "socket"
        assert [one.tokens for one in session.generate(prompts, max_new_tokens=6)] == wanted
        assert session.timing.transport == "socket"
        session.way, session._linked = "nixl", False
        assert [one.tokens for one in session.generate(prompts, max_new_tokens=6)] == wanted
        assert session.decode.process.pid == decode_pid and session.decode.process.poll() is None


def test_auto_is_nixl_where_both_stages_have_gpus_and_it_is_there(monkeypatch):
    for one, other in itertools.product(("cpu", "cuda:1"), repeat=2):
        placed = RuntimeConfig(prefill_device=one, decode_device=other)
        both = "cpu" not in (one, other)
        assert placed.way == ("nixl" if both else "socket")
    monkeypatch.setattr(runtime_config, "find_spec", lambda name: None)
    assert RuntimeConfig(prefill_device="cuda", decode_device="cuda").way == "socket"
    with pytest.raises(PdtrimError, match=r"pip install pdtrim\[nixl\]"):
        RuntimeConfig(transport="nixl")
    with pytest.raises(PdtrimError, match="unknown transport 'pigeon'"):
        RuntimeConfig(transport="pigeon")


def test_a_package_that_does_not_import_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "nixl._api", None)
    with pytest.raises(PdtrimError, match=r"pip install pdtrim\[nixl\]"):
        Shelf(model.device)


def test_a_device_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(PdtrimError, match="no device 'tpu': give cpu, cuda or cuda:NUMBER"):
        RuntimeConfig(prefill_device="tpu")
    for stage in (prefill, decode):
        with pytest.raises(PdtrimError, match=r"device 'cuda:99': torch finds \d+ GPUs here"):
            stage.load(None, str(tmp_path), "cuda:99")
