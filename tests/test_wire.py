"""The wire format, over real sockets: what it carries and what it refuses."""

import hashlib
import socket
import struct
import threading

import pytest
import torch

from helpers import first_last, frame_of, make_plan, send_layers, tiny_model
from pdtrim.errors import WireError
from pdtrim.kv import frame, wire
from pdtrim.kv.codecs import parse_codec
from pdtrim.kv.frame import Layout, SentLayer, pack_mask, unpack_mask
from pdtrim.kv.policy import gather
from pdtrim.kv.selectors.snapkv import SnapKV
from pdtrim.kv.wire import read_answer
from pdtrim.plan import Gates, LayerKV
from pdtrim.runtime.receiver import Receiver

ID = bytes(range(16))


@pytest.fixture(scope="module")
def plan():
    model = tiny_model("llama")
    cut = first_last(2, 3)
    return make_plan(
        model, Gates.removing(4, prefill={1}, decode={2}), (cut,) * 2 + (LayerKV(),) * 2
    )


@pytest.fixture
def receiver(plan):
    receiver = Receiver(plan, torch.float32)
    yield receiver
    receiver.close()


def connect(receiver):
    """The sender's end of a new stream to it."""
    ours, theirs = socket.socketpair()
    ours.settimeout(20)
    receiver.attach(theirs)
    return ours


def sealed(raw, part):
    """A spoiled first part, of ``part`` bytes, whose hash fits: its peer lies, no bit changed."""
    body = raw[: frame.HEAD.size + part - frame.HASH_BYTES]
    return body + hashlib.sha256(body).digest() + raw[frame.HEAD.size + part :]


def layers_of(layout, keep=None):
    """Random pairs for each layer; ``keep`` says which where the plan does not."""
    generator = torch.Generator().manual_seed(1)
    N, D = layout.tokens, layout.head_dim
    sent = {}
    for entry in layout.entries:
        keep_GN = keep if entry.static_GN is None else entry.static_GN
        G = entry.num_heads
        k, v = (torch.randn(1, G, N, D, generator=generator).to(layout.dtype) for _ in "kv")
        view = type("View", (), {"k_BGND": k, "v_BGND": v})
        sent[entry.layer] = SentLayer(keep_GN=keep_GN, groups=gather(view, keep_GN[None]))
    return sent


def same(a, b):
    assert a.keep_GN.equal(b.keep_GN)
    for one, two in zip(a.groups, b.groups, strict=True):
        assert one.heads == two.heads and one.positions_BgM.equal(two.positions_BgM)
        assert one.k_BgMD.equal(two.k_BgMD) and one.v_BgMD.equal(two.v_BgMD)


@pytest.mark.parametrize("dtype", frame.DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 5, 6, 40])
def test_a_frame_arrives_bit_for_bit(plan, dtype, tokens):
    receiver = Receiver(plan, dtype)
    layout = Layout.of(plan, dtype, tokens)
    layers = layers_of(layout)
    receiver.expect(ID, tokens)
    with connect(receiver) as link:
        sent = send_layers(link, layout, ID, layers)
        read_answer(link)
    arrived = receiver.take(ID)
    assert sent == arrived.frame_bytes == layout.frame_bytes
    assert list(arrived.layers) == [0, 1, 3]  # decode lost layer 2: nothing travels for it
    for layer, sent_layer in layers.items():
        same(arrived.layers[layer], sent_layer)


def test_frame_bytes_are_what_crosses_a_socket(plan):
    layout = Layout.of(plan, torch.bfloat16, 30)
    ours, theirs = socket.socketpair()
    seen = bytearray()

    def drain():
        while data := theirs.recv(1 << 16):
            seen.extend(data)

    thread = threading.Thread(target=drain)
    thread.start()
    sent = send_layers(ours, layout, ID, layers_of(layout))
    ours.close()
    thread.join()
    assert len(seen) == sent == layout.frame_bytes
    kept = {0: 5, 1: 5, 3: 30}
    sent = sum(entry.mask_bytes + entry.data_bytes for entry in layout.entries)
    assert sent == sum(2 * 2 * m * 8 * 2 for m in kept.values())


def valid_frame(layout, keep=None):
    return frame_of(layout, ID, layers_of(layout, keep))


def patch(raw, offset, data):
    return raw[:offset] + data + raw[offset + len(data) :]


BAD = {
    "magic": (lambda f: patch(f, 0, b"GET / HT"), "wrong magic"),
    "version": (lambda f: patch(f, 8, struct.pack("<H", 1)), "wire version 1"),
    "digest": (lambda f: patch(f, 10, b"\0" * 32), "digest 000000"),
    "request": (lambda f: patch(f, 42, b"\0" * 16), "no such request"),
    "tokens": (lambda f: patch(f, 58, struct.pack("<I", 21)), "21 tokens sent, 20 expected"),
    "dtype": (lambda f: patch(f, 62, b"\0"), "bfloat16 sent"),
    "unknown dtype": (lambda f: patch(f, 62, b"\7"), "unknown dtype"),
    "layers": (lambda f: patch(f, 63, struct.pack("<H", 2)), "layers"),
    "too many layers": (lambda f: patch(f, 63, struct.pack("<H", 65000)), "65000 layers"),
    "more": (lambda f: patch(f, 65, struct.pack("<H", 1)), "count down|magic"),
    "oversized": (lambda f: patch(f, 73, struct.pack("<Q", 1 << 60)), "640 bytes expected"),
    "order": (lambda f: patch(f, 67, struct.pack("<H", 2)), "part of layer 2 came"),
    "mask size": (lambda f: patch(f, 69, struct.pack("<I", 2)), "part of layer 0 came"),
    "truncated header": (lambda f: f[:40], "truncated frame: 40 of 67"),
    "truncated entry": (lambda f: f[:74], "truncated frame: 7 of 14"),
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
    receiver.expect(ID, 20)
    layout = Layout.of(plan, torch.float32, 20)
    head = valid_frame(layout)[: frame.HEAD.size + frame.ENTRY.size]
    monkeypatch.setattr(wire.torch, "empty", lambda *a, **k: allocated.append(a))
    with connect(receiver) as link:
        link.sendall(patch(head, 73, struct.pack("<Q", 1 << 60)))
        with pytest.raises(WireError):
            read_answer(link)
    assert allocated == []


@pytest.fixture(scope="module")
def free_plan():
    """A plan whose masks and sizes the prompt decides."""
    model = tiny_model("llama")
    rule = LayerKV(selector=SnapKV(share=0.5), codec=parse_codec("lossless"))
    packed = LayerKV(selector=SnapKV(share=0.5), codec=parse_codec("int4:first=1,recent=2"))
    return make_plan(model, Gates.dense(4), (rule, packed, rule, packed))


def random_keep(heads, tokens):
    keep = torch.rand(heads, tokens, generator=torch.Generator().manual_seed(2)) < 0.5
    keep[1, 0] = True
    keep[0, 0] = False  # heads that keep unequally many
    return keep


@pytest.mark.parametrize("tokens", [1, 8, 21])
def test_masks_and_variable_codecs_travel(free_plan, tokens):
    receiver = Receiver(free_plan, torch.float32)
    layout = Layout.of(free_plan, torch.float32, tokens)
    assert not layout.exact
    layers = layers_of(layout, random_keep(2, tokens))
    receiver.expect(ID, tokens)
    with connect(receiver) as link:
        sent = send_layers(link, layout, ID, layers)
        read_answer(link)
    arrived = receiver.take(ID)
    assert sent == arrived.frame_bytes <= layout.frame_bytes
    same(arrived.layers[0], layers[0])
    coded = parse_codec("int4:first=1,recent=2")
    for one, two in zip(arrived.layers[1].groups, layers[1].groups, strict=True):
        k, v = coded.round_trip(two.k_BgMD[0], two.v_BgMD[0])
        assert one.k_BgMD[0].equal(k) and one.v_BgMD[0].equal(v)


MASK = frame.HEAD.size + frame.ENTRY.size
# behind two rows of the mask, a length, and three bytes of each number of the first head
LANES = MASK + 6 + 4 + 2 * 8 * 3 * int(random_keep(2, 21)[0].sum())
FREE_FAULTS = {
    "more than any choice": (lambda f: patch(f, 73, struct.pack("<Q", 1 << 40)), "at most"),
    "mask of other tokens": (lambda f: patch(f, MASK + 2, b"\xff"), "tokens that do not exist"),
    "mask and data": (lambda f: patch(f, MASK, b"\0\0\0\0\0\0"), "layer 0"),
    "piece length": (lambda f: patch(f, MASK + 6, b"\xff\xff\xff\x7f"), "layer 0"),
    "garbage in a piece": (lambda f: patch(f, LANES, b"\xff" * 9), "KV codes"),
}


@pytest.mark.parametrize("fault", FREE_FAULTS)
def test_a_bad_free_frame_is_refused(free_plan, fault):
    receiver = Receiver(free_plan, torch.float32)
    layout = Layout.of(free_plan, torch.float32, 21)
    spoil, words = FREE_FAULTS[fault]
    receiver.expect(ID, 21)
    with connect(receiver) as link:
        raw = valid_frame(layout, random_keep(2, 21))
        data = frame.ENTRY.unpack_from(raw, frame.HEAD.size)[2]
        link.sendall(sealed(spoil(raw), MASK - frame.HEAD.size + 6 + data + frame.HASH_BYTES))
        link.shutdown(socket.SHUT_WR)
        with pytest.raises(WireError, match=words):
            read_answer(link)
    with pytest.raises(WireError, match="no KV cache has arrived"):
        receiver.take(ID)
    receiver.close()


@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 9, 64])
def test_masks_are_packed_bit_by_bit(tokens):
    keep = torch.rand(3, tokens) < 0.5
    packed = pack_mask(keep)
    assert packed.numel() == 3 * -(-tokens // 8)
    assert unpack_mask(packed, 3, tokens).equal(keep)


def test_a_request_is_taken_once(plan, receiver):
    layout = Layout.of(plan, torch.float32, 20)
    receiver.expect(ID, 20)
    with connect(receiver) as link:
        link.sendall(valid_frame(layout))
        read_answer(link)
        link.sendall(valid_frame(layout))
        with pytest.raises(WireError, match="no such request"):
            read_answer(link)


def bits(raw):
    """The frame with each bit flipped in turn."""
    for at in range(len(raw)):
        for bit in range(8):
            yield patch(raw, at, bytes([raw[at] ^ 1 << bit]))


def read(plan, dtype, raw):
    """What a receiver makes of bytes, in this thread."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(raw)
        ours.shutdown(socket.SHUT_WR)
        reader, layout = wire.FrameReader(theirs), Layout.of(plan, dtype, 3)
        opening = reader.opening()
        if opening.request != ID or opening.more:
            raise WireError("no such request is expected here")
        frame.check_opening(opening, layout)
        return {entry.layer: reader.part(entry, layout) for entry in layout.entries}


def test_no_flipped_bit_of_a_frame_is_accepted(plan, free_plan):
    """In heads, entries, masks, data of fixed and of varying length, and the hash itself."""
    keep = torch.tensor([[True, False, True], [True, True, False]])
    for made in (plan, free_plan):
        layout = Layout.of(made, torch.bfloat16, 3)
        raw = valid_frame(layout, keep)
        assert read(made, torch.bfloat16, raw).keys() == set(made.sent_layers)
        spoiled = list(bits(raw))
        for one in spoiled:
            with pytest.raises(WireError):
                read(made, torch.bfloat16, one)
        assert len(set(spoiled)) == 8 * len(raw) > 2000


def test_a_codec_that_fails_in_its_own_way_is_a_refusal(plan, receiver, monkeypatch):
    layout = Layout.of(plan, torch.float32, 20)
    receiver.expect(ID, 20)

    def fails(*args):
        raise IndexError("out of\nrange")

    with monkeypatch.context() as patched, connect(receiver) as link:
        patched.setattr(wire, "decode_groups", fails)
        link.sendall(valid_frame(layout))
        with pytest.raises(WireError, match="IndexError: out of range"):
            read_answer(link)
    with connect(receiver) as link:
        link.sendall(valid_frame(layout))
        read_answer(link)
    assert receiver.take(ID).frame_bytes == layout.frame_bytes


def test_a_new_stream_ends_the_one_before_and_what_it_had_begun(plan, receiver):
    layout = Layout.of(plan, torch.float32, 20)
    raw = valid_frame(layout)
    receiver.expect(ID, 20)
    with connect(receiver) as first, connect(receiver) as second:
        assert first.recv(1) == b""
        second.sendall(raw[:200])
        with connect(receiver) as third:
            third.sendall(raw)
            read_answer(third)
    assert list(receiver.take(ID).layers) == [0, 1, 3]
    receiver.expect(ID, 20)
    receiver.clear()
    with connect(receiver) as link:
        link.sendall(raw)
        with pytest.raises(WireError, match="no such request"):
            read_answer(link)
