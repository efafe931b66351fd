"""The kernels against the torch path, on a GPU or, without one, in Triton's interpreter.

``interpreted.py`` sees to that. Shapes: L heads, T tokens of a cache, M kept, D head width.
"""

from __future__ import annotations

import pytest
import torch

from helpers import pairs
from pdtrim.bench.codec import bench_codecs
from pdtrim.bench.configs import CodecsConfig
from pdtrim.errors import WireError
from pdtrim.kv import kernels
from pdtrim.kv.codecs import Integer, parse_codec
from pdtrim.kv.codecs.integer import quantise

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's numpy
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

CASES = [
    # every number of bits, whole groups and short ones, N of every rest by eight
    ("int8", 105, 64, BF16),
    ("int4", 101, 64, BF16),  # 65 coded: a channel's codes end within a byte
    ("int4", 164, 128, FP16),
    ("int3", 140, 128, BF16),  # 104: whole octets
    ("int3", 77, 64, FP32),  # 41: a short group, and codes across bytes
    ("int2", 72, 64, FP32),
    ("int2", 75, 128, BF16),
    ("k8v4", 70, 64, FP32),
    ("k3v2:first=0", 50, 128, FP32),
    ("int4:rotate=true", 101, 64, BF16),
    ("k2v8:rotate=true", 112, 128, FP16),
    ("k3v4:rotate=true,recent=0", 71, 128, FP32),
    # groups: of part of a head, of no power of two, of one, longer than a tile and than the head
    ("int4:group=32,recent=5", 80, 128, BF16),
    ("int3:group=24,first=0,recent=0", 50, 64, FP16),
    ("k3v2:group=20,first=1,recent=3", 45, 64, BF16),
    ("int4:group=1,first=0,recent=0", 9, 8, BF16),
    ("int3:group=128,recent=0,rotate=true", 140, 128, BF16),
    ("k4v3:group=300,first=0,recent=0", 311, 128, BF16),
    ("int4:group=300,first=0,recent=0,rotate=true", 290, 64, BF16),
    # widths that are no power of two
    ("int4", 81, 80, BF16),
    ("k3v2", 84, 96, BF16),
    # nothing coded, nothing raw, nothing at all
    ("int4", 36, 64, BF16),
    ("int4:first=0,recent=0", 1, 64, FP32),
    ("int4", 0, 128, BF16),
    ("entropy", 261, 16, BF16),  # a whole lane and a short one
    ("entropy:k_step=0.05,v_step=2,first=0", 40, 24, FP16),
    ("entropy", 3, 64, FP32),
    ("entropy", 0, 64, BF16),
    ("lossless", 40, 16, BF16),
    ("lossless", 21, 24, FP16),
    ("lossless", 30, 8, FP32),
    ("lossless", 0, 64, BF16),
    ("fp8", 150, 64, BF16),
    ("fp8", 133, 128, FP16),
    ("fp8", 3, 80, FP32),
    ("fp8", 0, 64, BF16),
]
IDS = [f"{name}-{M}-{D}-{str(dtype)[6:]}" for name, M, D, dtype in CASES]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """It asks again when it runs."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def on_device(*tensors):
    return [x.to(DEVICE) for x in tensors]


def both(run):
    """What the kernels make and what torch makes."""
    with kernels.use("triton"):
        ours = run()
    with kernels.use("torch"):
        return ours, run()


def assert_same(ours, theirs):
    for x, y in zip(ours, theirs, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        assert torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


@pytest.mark.parametrize(("name", "M", "D", "dtype"), CASES, ids=IDS)
def test_bytes_and_pairs_are_those_of_torch(name, M, D, dtype):
    codec = parse_codec(name)
    k, v = on_device(*pairs(2, M, D, dtype))
    k[:, M // 2 :, 5] = 3.0  # a group of equal elements
    assert codec.kernels
    data, wanted = both(lambda: codec.encode(k, v))
    assert torch.equal(data, wanted)
    assert_same(*both(lambda: codec.decode(data, 2, M, D, dtype)))
    if M:  # a codec may follow one of odd length in a frame
        odd = torch.cat((data.new_zeros(1), data))[1:]
        assert_same(*both(lambda: codec.decode(odd, 2, M, D, dtype)))


@pytest.mark.parametrize("index", (torch.int32, torch.int64))
@pytest.mark.parametrize("name", ("raw", "fp8", "int4", "k3v2:rotate=true", "entropy", "lossless"))
def test_kept_pairs_go_from_the_cache_to_the_wire(name, index):
    """Of a paged cache: slots of all heads, and an index that one or all heads share."""
    codec, L, T, M, D = parse_codec(name), 3, 190, 117, 64
    if codec.variable:  # the interpreter takes them step by step
        L, T, M, D = 1, 30, 17, 8
    k, v = pairs(1, T * L, D, BF16)
    k_LTD, v_LTD = on_device(*(x.view(T, L, D).transpose(0, 1) for x in (k, v)))
    draw = torch.Generator().manual_seed(0)
    kept_LM = torch.stack([torch.randperm(T, generator=draw)[:M].sort().values for _ in range(L)])
    (kept_LM,) = on_device(kept_LM.to(index))
    for kept in (kept_LM, kept_LM[:1].expand(L, M), kept_LM.T.contiguous().T):
        at = kept.long()[..., None].expand(-1, -1, D)
        with kernels.use("torch"):
            wanted = codec.encode(k_LTD.gather(1, at), v_LTD.gather(1, at))
        for data in both(lambda kept=kept: codec.encode_kept(k_LTD, v_LTD, kept)):
            assert torch.equal(data, wanted)


LAYERS = [
    ("raw", 29, 16, BF16),
    ("fp8", 29, 24, FP16),
    ("int4:first=2,recent=5", 70, 80, BF16),
    ("k3v2:rotate=true,recent=0,group=128", 149, 16, BF16),
    ("int8:recent=0", 29, 16, FP32),
]


def paged(pages, page, width, dtype, by_heads):
    """Three layers' caches of two heads, and their keys and values as rows."""
    shape = (pages, 2, page, 2 * width) if by_heads else (pages, page, 2, 2 * width)
    caches = [torch.randn(shape).to(DEVICE, dtype) for _ in range(3)]
    kv = []
    for cache in caches:
        whole, head, row, _ = (cache if by_heads else cache.transpose(1, 2)).stride()
        rows = ((2, (pages - 1) * (whole // row) + page, width), (head, row, 1))
        kv.append(tuple(cache.as_strided(*rows, at) for at in (0, width)))
    return caches, kv, whole // row


@pytest.mark.parametrize("shared", (True, False))
@pytest.mark.parametrize("by_heads", (True, False))
@pytest.mark.parametrize(("name", "M", "D", "dtype"), LAYERS)
def test_layers_are_coded_at_once_from_pages_to_pages(name, M, D, dtype, by_heads, shared):
    """To the bytes of each alone, and to nothing else in the caches; pages of one or all layers."""
    codec, page, pages = parse_codec(name), 16, 12
    _, kv, step = paged(pages, page, D, dtype, by_heads)

    def places():
        at_B = torch.randperm(pages)[: -(-M // page)] * step
        return (at_B[:, None] + torch.arange(page)).flatten()[:M].to(DEVICE)

    at_YM = places().expand(3, -1) if shared else torch.stack([places() for _ in range(3)])
    kept_YLM = at_YM[:, None].expand(-1, 2, -1)
    with kernels.use("torch"):
        wanted = [codec.encode_kept(*pair, kept) for pair, kept in zip(kv, kept_YLM, strict=True)]
    room = torch.full((3, -(-len(wanted[0]) // 16) * 16 + 16), 7, dtype=torch.uint8, device=DEVICE)
    with kernels.use("triton"):
        assert kernels.alike(kv, room)
        codec.encode_layers(kv, kept_YLM, room)
    assert torch.equal(room[:, : len(wanted[0])], torch.stack(wanted))
    assert (room[:, len(wanted[0]) :] == 7).all()
    caches, to, _ = paged(pages, page, D, dtype, by_heads)
    before = [cache.clone() for cache in caches]
    made = []
    for way in ("triton", "torch"):
        with kernels.use(way):
            codec.decode_layers(room, to, kept_YLM)
        made.append([cache.clone() for cache in caches])
        for cache, old in zip(caches, before, strict=True):
            cache.copy_(old)
    for ours, theirs, old in zip(*made, before, strict=True):
        assert torch.equal(ours, theirs)
        assert ((ours != old).any(-1)).sum() <= 2 * M
    caches[1].copy_(made[0][1])
    with kernels.use("torch"):
        decoded = codec.decode(wanted[1], 2, M, D, dtype)
    for x_LTD, x_LMD in zip(to[1], decoded, strict=True):
        assert torch.equal(x_LTD[:, at_YM[1]], x_LMD)


def test_layers_that_differ_are_coded_one_by_one():
    codec = parse_codec("fp8")
    _, kv, _ = paged(4, 16, 16, BF16, True)
    odd = torch.randn(2, 70, 17).to(DEVICE, BF16)[..., 1:]  # no whole words
    kept = torch.arange(20, device=DEVICE).expand(2, 2, -1)
    room = torch.zeros(2, 2**12, dtype=torch.uint8, device=DEVICE)
    assert not kernels.alike([kv[0], (odd, odd)], room) and not kernels.alike(kv, room[:, 1:])
    ours, theirs = both(
        lambda: codec.encode_layers([kv[0], (odd, odd)], kept, room) or room.clone()
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ("raw", "fp8", "int4", "entropy"))
def test_strides_of_a_cache_are_followed(name):
    codec = parse_codec(name)
    k, v = on_device(*pairs(2, 90, 128, BF16))
    slots = k.transpose(0, 1).contiguous().transpose(0, 1)
    columns = v.transpose(1, 2).contiguous().transpose(1, 2)  # not even a token's lie together
    with kernels.use("triton"):
        assert torch.equal(codec.encode(slots, columns), codec.encode(k, v))


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_ties_round_as_a_division_does(bits):
    """Quotients at ``code + 1/2`` and the nearest numbers on both sides of each."""
    top, size = 2**bits - 1, 256
    scales = [1.0, 1.0009765625, 1.25, 1.333, 1.5, 1.75, 1.998, 1.9990234375, 2.0**-9]
    scale_S1 = torch.tensor(scales).half().float()[:, None]
    tie_SC = scale_S1 * (torch.arange(top) + 0.5)
    x_SN = torch.cat((tie_SC, tie_SC.nextafter(2 * tie_SC), tie_SC.nextafter(0 * tie_SC)), 1)
    x_SN = torch.nn.functional.pad(x_SN, (0, -x_SN.shape[1] % (size - 2)))
    x_SJn = x_SN.view(len(scales), -1, size - 2)
    # both ends of the grid in each group
    ends_SJ2 = torch.stack((0 * scale_S1, top * scale_S1), -1).expand(-1, x_SJn.shape[1], -1)
    v = torch.cat((ends_SJ2, x_SJn), -1).view(1, -1, size)
    grid, codes = quantise(v, size, bits)
    assert not grid[0].any() and set(grid[1].unique().tolist()) <= set(scale_S1.flatten().tolist())
    assert codes.unique().numel() == 2**bits
    codec = Integer(k_bits=bits, v_bits=bits, group=size, first=0, recent=0)
    k, v = on_device(v, v)
    assert torch.equal(*both(lambda: codec.encode(k, v)))


def test_every_fp8_code_is_rounded_as_torch_does():
    """All bf16 numbers below the largest code, both signs: normal codes, small ones and ties."""
    x = torch.arange(0x43E1, dtype=torch.int32).to(torch.int16).view(BF16)  # to 448
    x = torch.cat((x, -x, x.new_zeros(-2 * len(x) % 64), x.new_full((64,), 448.0)))
    k, v = on_device(x.view(1, -1, 64), (x.float() * 0.37).to(BF16).view(1, -1, 64))
    data, wanted = both(lambda: parse_codec("fp8").encode(k, v))
    assert torch.equal(data, wanted) and data[4 : 4 + k.numel()].unique().numel() == 254
    assert_same(*both(lambda: parse_codec("fp8").decode(data, 1, k.shape[1], 64, BF16)))


@pytest.mark.parametrize("name", ("int8", "int3:rotate=true", "int4:group=24", "fp8", "entropy"))
@pytest.mark.parametrize("value", (1e9, -1e9, torch.inf, -torch.inf, torch.nan, -torch.nan))
@pytest.mark.parametrize("side", (0, 1))
def test_what_fp16_cannot_hold_is_refused(name, value, side):
    kv = on_device(*pairs(1, 60, 8))
    kv[side][0, 25, 3] = value
    with kernels.use("triton"), pytest.raises(WireError, match="KV holds"):
        parse_codec(name).round_trip(*kv)


@pytest.mark.parametrize("name", ("fp8", "int4:first=0,recent=0"))
@pytest.mark.parametrize("at", (0, -1))
def test_a_broken_number_anywhere_is_refused(name, at):
    codec = parse_codec(name)
    k, v = on_device(*pairs(2, 70, 64, BF16))
    data = codec.encode(k, v)
    sizes = codec.sizes(2, 70, 64, BF16) if isinstance(codec, Integer) else [8, 2 * 2 * 70 * 64]
    start, stop = (sizes[0], sum(sizes[:3])) if isinstance(codec, Integer) else (0, 8)
    grids = data[start:stop].view(torch.float16)
    with kernels.use("triton"):
        for bad in (torch.inf, torch.nan):
            kept = grids[at].clone()
            grids[at] = bad
            with pytest.raises(WireError, match="KV holds"):
                codec.decode(data, 2, 70, 64, BF16)
            grids[at] = kept
        codec.decode(data, 2, 70, 64, BF16)
        if name == "fp8":
            data[-1] = 0xFF
            with pytest.raises(WireError, match="KV holds"):
                codec.decode(data, 2, 70, 64, BF16)


@pytest.mark.parametrize("name", ("entropy", "lossless"))
def test_lanes_that_no_encoder_made_are_refused(name):
    L, M, D = 1, 60, 8
    codec = parse_codec(name)
    data = codec.encode(*on_device(*pairs(L, M, D, BF16)))
    *plain, heads, _ = codec.parts(data, L, M, D, BF16)
    at, lanes = sum(map(len, plain)), len(heads) // 3
    lane = int(heads[:lanes].argmax())
    with kernels.use("triton"):
        codec.decode(data, L, M, D, BF16)
        changes = [
            (at + lane, 0),
            (at + lane, 255),
            (at + lanes + lane, 200),
            (len(data) - 2, None),
        ]
        for place, value in changes:  # words, kinds, and where a lane ends
            kept = data[place].clone()
            data[place] = kept ^ 1 if value is None else value
            with pytest.raises(WireError, match="KV holds codes"):
                codec.decode(data, L, M, D, BF16)
            data[place] = kept
        for cut in (data[:-2], data[:-1], torch.cat((data, data[:2]))):
            with pytest.raises(WireError, match="KV holds codes"):
                codec.decode(cut, L, M, D, BF16)


def test_lanes_have_a_power_of_two_of_warps_at_every_width_that_kernels_take():
    """The interpreter launches with any number, a GPU with none but those."""
    codec, device = parse_codec("entropy"), torch.device(DEVICE)
    with kernels.use("triton"):
        module = kernels.kernels_of(codec, device, 100, 96)
        widths = [w for w in range(1, 300) if kernels.kernels_of(codec, device, 100, w)]
    assert 96 in widths
    assert {module.rans.warps_of(width) for width in widths} == {1, 2, 4, 8}


def test_what_is_decoded_together_is_refused_at_the_end():
    codec = parse_codec("fp8")
    data = codec.encode(*on_device(*pairs(1, 40, 8, BF16)))
    bad = data.clone()
    bad[-1] = 0xFF
    decoded = []
    with kernels.use("triton"):
        with pytest.raises(WireError, match="fp8 KV holds"), kernels.together():
            for some in (data, bad, data):
                decoded.append(codec.decode(some, 1, 40, 8, BF16))
        assert len(decoded) == 3
        with kernels.together():
            codec.decode(data, 1, 40, 8, BF16)
        with pytest.raises(WireError, match="fp8 KV holds"):
            codec.decode(bad, 1, 40, 8, BF16)


def test_a_least_of_minus_zero_travels_as_zero():
    k, v = on_device(torch.zeros(1, 64, 64), torch.zeros(1, 64, 64))
    k[:, ::2], v[..., ::2] = -0.0, -0.0
    codec = Integer(first=0, recent=0)
    data, wanted = both(lambda: codec.encode(k, v))
    assert torch.equal(data, wanted) and not data.view(torch.float16)[: 2 * 64].signbit().any()


def test_the_torch_path_codes_what_kernels_do_not_take():
    codec, device = parse_codec("int4"), torch.device(DEVICE)
    with kernels.use("triton"):
        assert kernels.kernels_of(codec, device, 100, 64) is not None
        assert kernels.kernels_of(codec, device, 100, 12) is None
        assert kernels.kernels_of(codec, device, 2**22, 64) is None
        assert kernels.kernels_of(parse_codec("entropy"), device, 100, 60) is None
        assert kernels.kernels_of(parse_codec("int4:rotate=true"), device, 100, 80) is None
    with kernels.use("torch"):
        assert kernels.kernels_of(codec, torch.device("cuda"), 100, 64) is None
    assert kernels.kernels_of(codec, torch.device("cpu"), 100, 64) is None
    if DEVICE == "cuda":
        assert kernels.kernels_of(codec, device, 100, 64) is not None


def test_the_bench_times_the_path_that_it_names():
    shape = {"heads": 1, "tokens": 60, "width": 64, "repeats": 1}
    for way in ("triton", "torch"):
        config = CodecsConfig(codecs=("raw", "int4", "fp8", "lossless"), **shape)
        report = bench_codecs(config, way=way, device=DEVICE)
        paths = [entry["path"] for entry in report["codecs"]]
        assert paths == [way] * 4
        assert (report["hardware"] is None) == (DEVICE == "cpu")
