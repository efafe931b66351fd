"""The wire format, over real sockets: what it carries and what it refuses."""

import socket
import struct
import threading

import pytest
import torch

from helpers import make_plan, tiny_model
from pdtrim.errors import WireError
from pdtrim.kv import wire
from pdtrim.kv.wire import Layout, read_answer, send_frame
from pdtrim.plan import Gates, LayerKV
from pdtrim.runtime.receiver import Receiver

ID = bytes(range(16))


@pytest.fixture(scope="module")
def plan():
    model = tiny_model("llama")
    cut = LayerKV(selector="first_last", first=2, last=3)
    return make_plan(
        model, Gates.removing(4, prefill={1}, decode={2}), (cut,) * 2 + (LayerKV(),) * 2
    )


@pytest.fixture
def receiver(plan):
    receiver = Receiver(plan, torch.float32)
    yield receiver
    receiver.close()


def connect(receiver):
    return socket.create_connection(("127.0.0.1", receiver.port), timeout=20)


def layers_of(layout):
    generator = torch.Generator().manual_seed(1)
    shape = (layout.num_kv_heads, 1, layout.head_dim)
    return {
        layer: tuple(
            torch.randn(shape[0], kept, shape[2], generator=generator).to(layout.dtype)
            for _ in "kv"
        )
        for layer, kept in layout.kept
    }


@pytest.mark.parametrize("dtype", wire.DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 5, 6, 40])
def test_a_frame_arrives_bit_for_bit(plan, dtype, tokens):
    receiver = Receiver(plan, dtype)
    layout = Layout.of(plan, dtype, tokens)
    layers = layers_of(layout)
    receiver.expect(ID, tokens)
    with connect(receiver) as link:
        sent = send_frame(link, layout, ID, layers)
        read_answer(link)
    arrived = receiver.take(ID)
    assert sent == arrived.frame_bytes == layout.frame_bytes
    assert list(arrived.layers) == [0, 1, 3]  # decode lost layer 2: nothing travels for it
    for layer, (k, v) in layers.items():
        assert torch.equal(arrived.layers[layer][0], k) and torch.equal(arrived.layers[layer][1], v)


def test_frame_bytes_are_what_crosses_a_socket(plan):
    layout = Layout.of(plan, torch.bfloat16, 30)
    ours, theirs = socket.socketpair()
    seen = bytearray()

    def drain():
        while data := theirs.recv(1 << 16):
            seen.extend(data)

    thread = threading.Thread(target=drain)
    thread.start()
    sent = send_frame(ours, layout, ID, layers_of(layout))
    ours.close()
    thread.join()
    assert len(seen) == sent == layout.frame_bytes
    kept = {0: 5, 1: 5, 3: 30}
    assert layout.payload_bytes == sum(2 * 2 * m * 8 * 2 for m in kept.values())


def valid_frame(layout):
    payload = b"".join(wire.pack_layer(*kv).numpy().tobytes() for kv in layers_of(layout).values())
    return layout.head(ID) + payload


def patch(frame, offset, data):
    return frame[:offset] + data + frame[offset + len(data) :]


BAD = {
    "magic": (lambda f: patch(f, 0, b"GET / HT"), "wrong magic"),
    "version": (lambda f: patch(f, 8, struct.pack("<H", 2)), "wire version 2"),
    "digest": (lambda f: patch(f, 10, b"\0" * 32), "digest 000000"),
    "request": (lambda f: patch(f, 42, b"\0" * 16), "no such request"),
    "tokens": (lambda f: patch(f, 58, struct.pack("<I", 21)), "21 tokens sent, 20 expected"),
    "dtype": (lambda f: patch(f, 62, b"\0"), "bfloat16 sent"),
    "unknown dtype": (lambda f: patch(f, 62, b"\7"), "unknown dtype"),
    "layers": (lambda f: patch(f, 63, struct.pack("<H", 2)), "layers"),
    "too many layers": (lambda f: patch(f, 63, struct.pack("<H", 65000)), "65000 layers"),
    "oversized": (lambda f: patch(f, 65, struct.pack("<Q", 1 << 60)), "bytes expected"),
    "table": (lambda f: patch(f, 73, struct.pack("<H", 2)), "layer table"),
    "truncated header": (lambda f: f[:40], "truncated frame: 40 of 73"),
    "truncated table": (lambda f: f[:80], "truncated frame: 7 of 42"),
    "truncated payload": (lambda f: f[:-5], "truncated frame"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_frame_is_refused_and_the_next_good_one_taken(plan, receiver, fault):
    layout = Layout.of(plan, torch.float32, 20)
    spoil, words = BAD[fault]
    receiver.expect(ID, 20)
    with connect(receiver) as link:
        link.sendall(spoil(valid_frame(layout)))
        link.shutdown(socket.SHUT_WR)
        with pytest.raises(WireError, match=words):
            read_answer(link)
    with pytest.raises(WireError, match="no KV cache has arrived"):
        receiver.take(ID)
    with connect(receiver) as link:
        link.sendall(valid_frame(layout))
        read_answer(link)
    assert list(receiver.take(ID).layers) == [0, 1, 3]


def test_an_oversized_claim_allocates_nothing(plan, receiver, monkeypatch):
    allocated = []
    monkeypatch.setattr(wire.torch, "empty", lambda *a, **k: allocated.append(a))
    receiver.expect(ID, 20)
    layout = Layout.of(plan, torch.float32, 20)
    with connect(receiver) as link:
        link.sendall(patch(layout.head(ID), 65, struct.pack("<Q", 1 << 60)))
        with pytest.raises(WireError):
            read_answer(link)
    assert allocated == []


def test_a_request_is_taken_once(plan, receiver):
    layout = Layout.of(plan, torch.float32, 20)
    receiver.expect(ID, 20)
    with connect(receiver) as link:
        link.sendall(valid_frame(layout))
        read_answer(link)
        link.sendall(valid_frame(layout))
        with pytest.raises(WireError, match="no such request"):
            read_answer(link)


def test_it_listens_on_loopback_only(receiver):
    assert receiver.listener.getsockname()[0] == "127.0.0.1"
