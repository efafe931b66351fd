"""A request's KV in coded form: the range, its pool and its ticket. No vLLM here."""

import itertools
import struct
from types import SimpleNamespace

import pytest
import torch

from helpers import first_last, make_plan, tiny_model
from pdtrim.engines.pages import check_servable, is_coded
from pdtrim.engines.ranges import (
    ALIGN,
    HEAD,
    Form,
    Pool,
    Ticket,
    pool_bytes,
)
from pdtrim.errors import WireError
from pdtrim.kv import checksum as module
from pdtrim.kv import kernels
from pdtrim.kv.checksum import checksum
from pdtrim.kv.codecs import parse_codec
from pdtrim.kv.policy import HandoverPolicy, hand_over
from pdtrim.plan import Gates, LayerKV

BLOCK = 32
NONCE = bytes(range(16))
CODECS = ("int8", "int4:group=32,recent=8", "fp8", "entropy", "lossless", "raw")
HEADS, WIDTH = 2, 32


def plan_of(*codecs, gates=None):
    """Layers in turn whole and trimmed."""
    kv = []
    for layer in range(4):
        codec = parse_codec(codecs[layer % len(codecs)])
        selector = first_last(20, 50).selector if layer % 2 else LayerKV().selector
        kv.append(LayerKV(selector=selector, codec=codec))
    model = tiny_model(head_dim=WIDTH)
    return make_plan(model, gates or Gates.removing(4), tuple(kv), block_size=BLOCK)


def prompt_kv(plan, tokens, dtype=torch.float32):
    """Keys and values ``[1, G, N - 1, D]`` of the layers that travel."""
    torch.manual_seed(tokens)
    shape = (1, HEADS, tokens - 1, WIDTH)
    return {
        i: (torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)) for i in plan.sent_layers
    }


def kept(form, kv):
    """What prefill gathers from its pages, a layer at a time."""
    for part in form.parts:
        start, stop = (page * BLOCK for page in part.hole)
        pair = (torch.cat((x[0, :, :start], x[0, :, stop:]), dim=1) for x in kv[part.layer])
        yield [tuple(pair)], None


def decoded(form, staged, nonce=NONCE):
    """Each part with its keys and values."""
    for parts, data in form.read(staged, nonce):
        for part, row in zip(parts, data, strict=True):
            yield part, *part.decode(row)


def written(plan, tokens, dtype=torch.float32):
    form = Form.of(plan, dtype, tokens, BLOCK)
    room = torch.full((form.most + 64,), 7, dtype=torch.uint8)
    kv = prompt_kv(plan, tokens, dtype)
    nbytes = form.write(room, NONCE, kept(form, kv))
    assert (room[nbytes:] == 7).all() or not form.exact
    return form, room[:nbytes], kv


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("codec", CODECS)
def test_decode_sees_what_the_simulator_sees(codec, dtype):
    """Bit by bit, at the edges of pages and of the hole, and for a prompt of one token."""
    plan = plan_of(codec, "raw", codec)
    policy = HandoverPolicy.of(plan)
    for tokens in (1, 2, 33, 34, 84, 115, 200):
        form, staged, kv = written(plan, tokens, dtype)
        assert form.fits(len(staged))
        for part, k_GMD, v_GMD in decoded(form, staged):
            k, v = kv[part.layer]
            (seen,) = hand_over(
                policy, part.layer, SimpleNamespace(k_BGND=k, v_BGND=v, bias=lambda: None)
            )
            assert torch.equal(k_GMD, seen.k_BgMD[0]), (tokens, part)
            assert torch.equal(v_GMD, seen.v_BgMD[0]), (tokens, part)


@pytest.mark.parametrize("codec", CODECS)
def test_ranks_make_of_their_heads_what_one_makes_of_all(codec):
    plan = plan_of(codec, "raw", codec)
    for tokens in (1, 84, 115):
        form, staged, kv = written(plan, tokens)
        share, read = Form.of(plan, torch.float32, tokens, BLOCK, HEADS), []
        for rank in range(HEADS):
            room = torch.zeros(share.most, dtype=torch.uint8)
            own = {i: [x[:, rank : rank + 1] for x in pair] for i, pair in kv.items()}
            nbytes = share.write(room, NONCE, kept(share, own))
            read.append(decoded(share, room[:nbytes]))
        for whole, *shares in zip(decoded(form, staged), *read, strict=True):
            assert all(part.heads == 1 for part, *_ in shares)
            for place in (1, 2):
                assert torch.equal(whole[place], torch.cat([made[place] for made in shares]))


def test_only_layers_that_decode_reads_are_in_it():
    plan = plan_of("int8", gates=Gates.removing(4, prefill={2}, decode={0, 2}))
    assert [part.layer for part in Form.of(plan, torch.float32, 50, BLOCK).parts] == [1, 3]


def test_layers_that_are_alike_stand_together_and_are_written_at_once():
    """From rows of a larger cache, to the bytes that they make one by one."""
    form, *_ = written(plan_of("int8", "int8", "raw"), 200)
    assert [[part.layer for part in run] for run in form.runs] == [[0], [1, 3], [2]]
    form, staged, kv = written(plan_of("int8", "raw"), 200)
    assert [[part.layer for part in run] for run in form.runs] == [[0, 2], [1, 3]]
    room = torch.zeros(form.most, dtype=torch.uint8)

    def batches():
        for run in form.runs:
            start, stop = (page * BLOCK for page in run[0].hole)
            at_M = torch.cat((torch.arange(start), torch.arange(stop, 199)))
            pairs = [tuple(x[0] for x in kv[part.layer]) for part in run]
            yield pairs, at_M.expand(len(run), HEADS, -1)

    assert form.write(room, NONCE, batches()) == len(staged)
    assert torch.equal(room, staged)
    for parts, data in form.read(staged, NONCE):
        assert data.data_ptr() % 16 == 0 and data.stride(0) % 16 == 0, "no copy, wide words"
        assert len(parts) == len(data) == 2


def test_what_no_layer_wrote_is_zero():
    """Between layers, and behind the table: a range may have held another prompt."""
    plan = plan_of("fp8", "int3:group=32,first=0,recent=0")
    clean, (form, staged, kv) = torch.zeros(2**20, dtype=torch.uint8), written(plan, 3)
    assert any(part.most % 16 for part in form.parts)
    assert form.write(clean, NONCE, kept(form, kv)) == len(staged)
    assert torch.equal(clean[: len(staged)], staged)


def test_a_range_that_is_not_this_requests_is_refused():
    form, staged, _ = written(plan_of("int4"), 100)
    list(decoded(form, staged))
    with pytest.raises(WireError, match="another request"):
        list(form.read(staged, NONCE[::-1]))
    with pytest.raises(WireError, match="not announced"):
        list(form.read(staged[:-8], NONCE))
    with pytest.raises(WireError, match="no whole words"):
        list(form.read(staged[:-1], NONCE))
    with pytest.raises(WireError, match="less than its own head"):
        list(form.read(staged[: HEAD.size], NONCE))
    with pytest.raises(WireError, match="not announced"):
        other = Form.of(plan_of("int4"), torch.float32, 101, BLOCK)
        list(other.read(staged, NONCE))
    for at in (HEAD.size, form.start + 5, len(staged) - 1):
        torn = staged.clone()
        torn[at] += 1
        with pytest.raises(WireError, match="not those that prefill wrote"):
            list(form.read(torn, NONCE))


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9])
def test_a_range_that_another_prompt_overwrote_in_part_is_refused(cut):
    """Whose head is still there, or already there."""
    form, old, _ = written(plan_of("int8"), 100)
    new = torch.zeros_like(old)
    kv = {i: (k * 2, v * 3) for i, (k, v) in prompt_kv(plan_of("int8"), 100).items()}
    form.write(new, NONCE, kept(form, kv))
    at = int(len(old) * cut)
    for torn in (torch.cat((old[:at], new[at:])), torch.cat((new[:at], old[at:]))):
        with pytest.raises(WireError, match="not those that prefill wrote"):
            list(form.read(torn, NONCE))


def test_a_table_that_lies_is_refused():
    """With a checksum that fits: sizes are bounded before anything is made from them."""
    form, staged, _ = written(plan_of("entropy"), 100)
    table = staged[HEAD.size :][: 8 * len(form.parts)].view(torch.int64)
    for change, words in ((form.most, "expected"), (-16, "add up")):
        table[0] += change
        head = staged[HEAD.size - 8 : HEAD.size].view(torch.int64)
        head.copy_(checksum(staged[HEAD.size :]))
        with pytest.raises(WireError, match=words):
            list(form.read(staged, NONCE))
        table[0] -= change


def reference_checksum(data):
    """SplitMix64's finaliser in whole numbers."""
    total = 0
    for number, (word,) in enumerate(struct.iter_unpack("<Q", data), start=1):
        z = (word + number * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        total += z ^ z >> 31
    return total % 2**64


def test_the_checksum_is_splitmix64_whatever_the_chunks(monkeypatch):
    data = torch.randint(0, 256, (8 * 100,), dtype=torch.uint8)
    wanted = reference_checksum(bytes(data.tolist()))
    for chunk in (1, 7, 100, 4096):
        monkeypatch.setattr(module, "CHUNK_HOST", chunk)
        assert int(checksum(data)) % 2**64 == wanted


@pytest.mark.parametrize("words", [0, 1, 4095, 4096, 9000])
def test_the_kernel_makes_the_same_checksum(words):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = torch.randint(-(2**63), 2**63 - 1, (words,)).view(torch.uint8).to(device)
    with kernels.use("torch"):
        wanted = checksum(data)
    with kernels.use("triton"):
        assert torch.equal(checksum(data), wanted)


def test_no_flipped_bit_of_a_range_is_accepted(monkeypatch):
    """In the head, the table and the data; nothing of it is decoded."""
    form, staged, _ = written(plan_of("entropy", "raw"), 2)
    list(decoded(form, staged))
    for part in form.parts:
        monkeypatch.setattr(type(part.codec), "decode", lambda *a: pytest.fail("decoded"))
    assert len(staged) > 500
    for at in range(len(staged)):
        for bit in range(8):
            staged[at] ^= 1 << bit
            with pytest.raises(WireError):
                list(form.read(staged, NONCE))
            staged[at] ^= 1 << bit


def test_two_flipped_bits_are_seen():
    """The same bit of two words too, bit 63 among them: sums of products do not see it twice."""
    generator = torch.Generator().manual_seed(0)
    for words in (torch.zeros(16, dtype=torch.int64), torch.randint(-(2**62), 2**62, (16,))):
        whole = int(checksum(words.view(torch.uint8)))
        for bit in range(64):
            for a, b in itertools.combinations(range(6), 2):
                spoiled = words.clone()
                spoiled[[a, b]] ^= torch.tensor(1 << bit if bit < 63 else -(1 << 63))
                assert int(checksum(spoiled.view(torch.uint8))) != whole, (bit, a, b)
        for a, b in torch.randint(0, 16 * 64, (500, 2), generator=generator).tolist():
            if a != b:
                data = words.view(torch.uint8).clone()
                data[a // 8] ^= 1 << a % 8
                data[b // 8] ^= 1 << b % 8
                assert int(checksum(data)) != whole, (a, b)


def test_the_checksum_sees_order():
    words = torch.randint(-(2**62), 2**62, (5000,))
    data = words.view(torch.uint8)
    for a, b in ((0, 1), (0, 1024), (3, 4999), (1030, 2051)):
        swapped = words.clone()
        swapped[[a, b]] = words[[b, a]]
        assert checksum(swapped.view(torch.uint8)) != checksum(data), (a, b)
    assert int(checksum(data[:0])) == 0


@pytest.mark.parametrize(
    "change, words",
    [
        ({}, None),
        ({"offset": -64}, "no range"),
        ({"offset": 8}, "no range"),
        ({"offset": True}, "no range"),
        ({"offset": "0"}, "no range"),
        ({"bytes": [2**40, 64]}, r"a prompt of 100 tokens has at most"),
        ({"bytes": [0, 0]}, "at most"),
        ({"bytes": None}, "no range"),
        ({"bytes": [None, None]}, "no range"),
        ({"bytes": [64]}, "ranges of 1 ranks, not of 2"),
        ({"nonce": "00"}, "no nonce"),
        ({"nonce": 5}, "no nonce"),
        ({"nonce": "x" * 32}, "no nonce"),
    ],
)
def test_a_ticket_is_checked_against_the_prompt(change, words):
    form = Form.of(plan_of("entropy"), torch.float32, 100, BLOCK, 2)
    ticket = Ticket(offset=128, sizes=(form.most, form.most - 64), nonce=NONCE)
    value = ticket.to_json() | change
    if words is None:
        assert Ticket.from_json(value, form, 2) == ticket
    else:
        with pytest.raises(WireError, match=words):
            Ticket.from_json(value, form, 2)
    with pytest.raises(WireError, match="no range"):
        Ticket.from_json(None, form, 2)


def test_a_ticket_of_a_fixed_length_has_that_length():
    form = Form.of(plan_of("int8"), torch.float32, 100, BLOCK)
    assert form.fits(form.most) and not form.fits(form.most - 16)
    varies = Form.of(plan_of("entropy"), torch.float32, 100, BLOCK)
    assert varies.fits(varies.most - 16) and not varies.fits(varies.most - 8)


def test_a_pool_gives_gaps_and_takes_them_back():
    pool = Pool(5 * ALIGN)
    assert pool.reserve("a", ALIGN) and pool.reserve("b", ALIGN + 1) and pool.reserve("c", 1)
    assert [pool.offset(key) for key in "abc"] == [0, ALIGN, 3 * ALIGN]
    assert not pool.reserve("d", 2 * ALIGN), "one unit is left"
    pool.release("b")
    pool.release("b")
    assert pool.reserve("d", 2 * ALIGN) and pool.offset("d") == ALIGN
    assert pool.reserve("e", ALIGN) and not pool.reserve("f", 1)
    assert "e" in pool and "f" not in pool and len(pool) == 4


def test_a_pool_holds_any_prompt_that_the_model_takes():
    """A trimmed prompt that is shorter may need more, since kept runs end with pages."""
    plan = plan_of("int4")
    for longest in (1, 5, 83, 84, 100, 115, 116, 300):
        size = pool_bytes(plan, torch.float32, longest, BLOCK, 1)
        forms = [Form.of(plan, torch.float32, n, BLOCK) for n in range(1, longest + 1)]
        assert max(form.most for form in forms) <= size < max(f.most for f in forms) + ALIGN
    assert pool_bytes(plan, torch.float32, 300, BLOCK, 3) == 3 * size


def test_plans_with_codecs_are_known():
    assert is_coded(plan_of("raw", "int8"))
    assert not is_coded(plan_of("raw"))
    only_dead = plan_of("int8", "raw", "raw", "raw", gates=Gates.removing(4, decode={0}))
    assert not is_coded(only_dead), "a layer that does not travel may have any codec"
    check_servable(plan_of("int8"), BLOCK)
