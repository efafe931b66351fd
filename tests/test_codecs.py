"""Every codec against bounds computed here from the data, not from the codec.

Shapes: L heads, M tokens, D head width.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from helpers import pairs
from pdtrim.errors import PlanError, WireError
from pdtrim.kv.codecs import (
    CODECS,
    Codec,
    Entropy,
    Fp8,
    Integer,
    Lossless,
    Raw,
    integer,
    parse_codec,
)
from pdtrim.kv.codecs.hadamard import hadamard
from pdtrim.kv.codecs.integer import fp16_below, head_runs, pack, quantise, unpack

NAMES = [
    *("raw", "fp8", "lossless", "int8", "int4", "int3", "int2", "k4v2", "k8v4"),
    *("int4:group=24,first=0,recent=0", "k3v2:group=5,first=1,recent=3", "int4:rotate=true"),
    *("entropy", "entropy:k_step=0.05,v_step=2,first=0"),
]
SHAPES = [(3, M, D) for M in (0, 1, 5, 37, 64, 200) for D in (8, 64, 128)] + [(0, 50, 8)]
DTYPES = (torch.bfloat16, torch.float32)


def body(codec, M):
    short = codec.first + codec.recent >= M
    return slice(0, 0) if short else slice(codec.first, M - codec.recent)


def bound(x_LMD, dim, group, bits):
    """Half a step an element, looped over the groups, and what fp16 and fp32 may add."""
    out = torch.zeros_like(x_LMD)
    for start in range(0, x_LMD.shape[dim], group):
        at = [slice(None)] * 3
        at[dim] = slice(start, start + group)
        part = x_LMD[tuple(at)]
        lo, hi = part.min(dim, keepdim=True).values, part.max(dim, keepdim=True).values
        step = (hi - lo + lo.abs() * 2**-10) / (2**bits - 1) * (1 + 2**-10) + 2**-23
        out[tuple(at)] = step / 2 * (1 + 1e-4) + 1e-6 * part.abs()
    return out


def assert_close(codec, x_LMD, y_LMD, keys):
    x_LMD, y_LMD, dtype = x_LMD.float(), y_LMD.float(), x_LMD.dtype
    if isinstance(codec, Raw | Lossless):
        assert torch.equal(x_LMD, y_LMD)
        return
    slack_LMD = torch.finfo(dtype).eps * y_LMD.abs()  # the result's own rounding
    if isinstance(codec, Fp8):
        step_L11 = x_LMD.abs().amax((1, 2), keepdim=True) / 448 if x_LMD.numel() else 0
        assert ((x_LMD - y_LMD).abs() <= x_LMD.abs() / 15.9 + step_L11 / 1000 + slack_LMD).all()
        return
    if isinstance(codec, Entropy):
        x_LND, y_LND = x_LMD[:, codec.first :], y_LMD[:, codec.first :]
        assert torch.equal(x_LMD[:, : codec.first], y_LMD[:, : codec.first])
        if x_LND.numel():
            centred = x_LND - x_LND.mean(1, keepdim=True) if keys else x_LND
            dims, step = ((1, 2), codec.k_step) if keys else (2, codec.v_step)
            rms = centred.square().mean(dims, keepdim=True).sqrt()
            allowed = torch.maximum(step * rms, centred.abs().amax(dims, keepdim=True) / 127) / 2
            slack = 1e-6 + (2**-9 + torch.finfo(dtype).eps) * x_LND.abs()
            assert ((x_LND - y_LND).abs() <= 1.01 * allowed + slack).all()
        return
    coded = body(codec, x_LMD.shape[1])
    bits = codec.k_bits if keys else codec.v_bits
    error_LMD = (x_LMD - y_LMD)[:, coded]
    if codec.rotate:
        error_LMD, x_LMD = hadamard(error_LMD), hadamard(x_LMD)
        slack_LMD = slack_LMD.norm(dim=-1, keepdim=True) + 1e-4
    allowed_LMD = bound(x_LMD[:, coded], 1 if keys else 2, codec.group, bits)
    assert (error_LMD.abs() <= allowed_LMD + slack_LMD[:, coded]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_codec_keeps_its_promises(name, shape, dtype):
    codec = parse_codec(name)
    k, v = pairs(*shape, dtype)
    data = codec.encode(k, v)
    assert data.dtype == torch.uint8 and data.dim() == 1 and data.is_contiguous()
    size = codec.nbytes(*shape, dtype)
    assert data.numel() <= size if codec.variable else data.numel() == size
    if name != "raw":  # a codec may follow one of odd length in a frame
        data = torch.cat((data.new_zeros(1), data))[1:]
    k_back, v_back = codec.decode(data, *shape, dtype)
    assert k_back.shape == v_back.shape == shape and k_back.dtype == v_back.dtype == dtype
    assert_close(codec, k, k_back, True)
    assert_close(codec, v, v_back, False)
    if isinstance(codec, Integer):
        coded = body(codec, shape[1])
        raw = torch.ones(shape[1], dtype=torch.bool)
        raw[coded] = False
        assert torch.equal(k[:, raw], k_back[:, raw]) and torch.equal(v[:, raw], v_back[:, raw])
    trip = codec.round_trip(k, v)
    assert torch.equal(trip[0], k_back) and torch.equal(trip[1], v_back)
    for wrong in (data[:-1], torch.cat((data, data.new_zeros(1)))):
        if wrong.numel() != data.numel() and data.numel():
            with pytest.raises(WireError):
                codec.decode(wrong, *shape, dtype)


@pytest.mark.parametrize("name", NAMES)
def test_heads_are_independent(name):
    codec = parse_codec(name)
    k, v = pairs(5, 111, 16, torch.bfloat16)
    k[2] *= 100
    k_back, v_back = codec.decode(codec.encode(k, v), 5, 111, 16, k.dtype)
    for head in range(5):
        at = slice(head, head + 1)
        k_one, v_one = codec.decode(codec.encode(k[at], v[at]), 1, 111, 16, k.dtype)
        assert torch.equal(k_back[at], k_one) and torch.equal(v_back[at], v_one)


@pytest.mark.parametrize("name", NAMES)
def test_strided_inputs_give_the_same_bytes(name):
    k, v = pairs(3, 70, 8)
    strided = k.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(parse_codec(name).encode(strided, v), parse_codec(name).encode(k, v))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("fp8", "d9133d3b2d34c42f97da9deba16b987418d03c95f6471fe23a1274067bf583fc"),
        ("int4", "836caabda853a861f24845b0352fe4901a6b9f1dae2b859f784d3ce6b1583bea"),
        ("k3v2:rotate=true", "8b92623428c6010f4b3c3ce932b27d85123205daa46cf5e9b4d1371d02d24fae"),
    ],
)
def test_the_bytes_on_the_wire_stay_as_they_are(name, wanted):
    """Two nodes may run two versions; the numbers are exact, so that all machines draw the same."""
    draw = torch.Generator().manual_seed(0)
    kv = torch.randint(-128, 129, (2, 3, 101, 32), generator=draw) * 2.0**-5
    data = parse_codec(name).encode(*kv.to(torch.bfloat16))
    assert hashlib.sha256(bytes(data.tolist())).hexdigest() == wanted


@pytest.mark.parametrize("width", (1, 8))  # an odd number of codes a head, and whole bytes
@pytest.mark.parametrize("name", NAMES)
def test_heads_in_runs_give_the_bytes_of_all_at_once(monkeypatch, name, width):
    codec, shape = parse_codec(name), (21, 75, width)
    k, v = pairs(*shape, torch.bfloat16)
    monkeypatch.setattr(integer, "RUN", 2**30)
    assert len(head_runs(21, 39 * width, k.device)) == 1
    data = codec.encode(k, v)
    back = codec.decode(data, *shape, k.dtype)
    monkeypatch.setattr(integer, "RUN", 1)
    assert len(head_runs(21, 39 * width, k.device)) >= 3
    assert torch.equal(codec.encode(k, v), data)
    for x, y in zip(codec.decode(data, *shape, k.dtype), back, strict=True):
        assert torch.equal(x, y)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_and_cuda_agree_to_the_bit(name, dtype):
    codec = parse_codec(name)
    k, v = pairs(8, 1000, 128, dtype)
    data, on_gpu = codec.encode(k, v), codec.encode(k.cuda(), v.cuda())
    assert on_gpu.is_cuda and torch.equal(data, on_gpu.cpu())
    there = codec.decode(on_gpu, 8, 1000, 128, dtype)
    for x, y in zip(codec.decode(data, 8, 1000, 128, dtype), there, strict=True):
        assert torch.equal(x, y.cpu())


def test_a_tiny_example_by_hand():
    codec = Integer(k_bits=2, v_bits=2, group=4, first=0, recent=0)
    k = torch.tensor([[[0.0, 10], [1, 10], [2, 10], [3, 16]]])
    v = torch.tensor([[[5.0, 5], [0, 3], [-3, 0], [1, 4]]])
    none = 2.0**-24
    grids = torch.tensor([0, 10, 1, 2, 5, 0, -3, 1, none, 1, 1, 1], dtype=torch.float16)
    # keys by token 00 10 20 33, values 00 03 03 03; the earlier code in the lower bits
    codes = [0b00_01_00_00, 0b11_11_00_10, 0b11_00_00_00, 0b11_00_11_00]
    data = codec.encode(k, v)
    assert data.tolist() == [*grids.view(torch.uint8).tolist(), *codes]
    k_back, v_back = codec.decode(data, 1, 4, 2, torch.float32)
    assert torch.equal(k_back, k) and torch.equal(v_back, v)


def test_k_bits_are_the_keys_and_v_bits_the_values():
    k, v = pairs(2, 200, 32)
    both, k8v2 = parse_codec("int8").round_trip(k, v), parse_codec("k8v2").round_trip(k, v)
    assert torch.equal(k8v2[0], both[0])
    assert torch.equal(k8v2[1], parse_codec("int2").round_trip(k, v)[1])
    assert parse_codec("k8v4").nbytes(2, 200, 32, k.dtype) == parse_codec("k4v8").nbytes(
        2, 200, 32, k.dtype
    )


def test_groups_start_at_the_first_coded_token():
    codec = Integer(k_bits=2, group=8, first=2, recent=3)
    k, v = torch.zeros(1, 2 + 8 + 5 + 3, 4), torch.zeros(1, 18, 4)
    k[:, 2:10], k[:, 10:15] = 1000.0, torch.tensor([0.0, 1, 2, 3, 0])[:, None]
    # a boundary one token off would share a grid between 1000 and these
    assert torch.equal(codec.round_trip(k, v)[0], k)


def test_error_falls_as_bits_grow():
    k, v = pairs(2, 300, 64)
    errors = [
        [(x - y).norm().item() for x, y in zip((k, v), trip, strict=True)]
        for trip in (parse_codec(f"int{bits}").round_trip(k, v) for bits in (2, 3, 4, 8))
    ]
    for coarse, fine in pairwise(errors):
        assert fine[0] < coarse[0] / 1.8 and fine[1] < coarse[1] / 1.8


def test_a_loud_key_channel_harms_no_other():
    k, v = pairs(2, 200, 64)
    loud = k.clone()
    loud[..., 5] = 300 + 100 * loud[..., 5]
    quiet, back = (parse_codec("int4").round_trip(x, v)[0] for x in (k, loud))
    others = torch.arange(64) != 5
    assert torch.equal(quiet[..., others], back[..., others])


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@pytest.mark.parametrize("count", (0, 1, 7, 8, 9, 1000))
def test_packing_loses_no_code(bits, count):
    draw = torch.Generator().manual_seed(count)
    codes = torch.randint(0, 2**bits, (count,), generator=draw, dtype=torch.uint8)
    data = pack(codes, bits)
    assert data.numel() == bits * -(-count // 8)
    number = sum(code << bits * i for i, code in enumerate(codes.tolist()))
    assert bytes(data.tolist()) == number.to_bytes(data.numel(), "little")
    assert torch.equal(unpack(data, bits, count), codes)


def test_hadamard_is_orthonormal_and_its_own_inverse():
    for D in (1, 2, 8, 128):
        H = hadamard(torch.eye(D))
        assert torch.allclose(H @ H.T, torch.eye(D), atol=1e-5) and torch.equal(H, H.T)
    assert torch.allclose(hadamard(torch.tensor([1.0, 1, 1, -1])), torch.tensor([1.0, 1, 1, -1]))
    for D in (0, 3, 80):
        with pytest.raises(PlanError, match="power of two"):
            hadamard(torch.zeros(2, D))
    with pytest.raises(ValueError, match="power of two, not 80"):
        parse_codec("int4:rotate=true").encode(*pairs(1, 50, 80))


def test_rotation_helps_values_with_outliers():
    k, v = pairs(2, 200, 128)
    v[..., 9] *= 50
    plain, rotated = (
        (parse_codec(f"int3:rotate={flag}").round_trip(k, v)[1] - v).square().mean().item()
        for flag in ("false", "true")
    )
    assert rotated < plain / 2


def test_fp16_below_is_the_nearest_number_below():
    x = torch.cat((torch.randn(2000) * 300, torch.randn(2000) * 1e-7, torch.tensor([0.0, -0.0])))
    y = fp16_below(x)
    assert (y.float() <= x).all()
    exact = x.half().float()
    assert torch.equal(fp16_below(exact).float(), exact)
    assert (x - y.float() <= (x.abs() * 2**-10).clamp(min=2**-24)).all()


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@pytest.mark.parametrize("scale", (1e-9, 1e-4, 1.0, 300.0, 1e4))
def test_extreme_magnitudes_stay_finite_and_near(bits, scale):
    x = (torch.randn(4, 64, generator=torch.Generator().manual_seed(1)) + 3) * scale
    grid, codes = quantise(x, 64, bits)
    assert grid.isfinite().all() and (grid[1] > 0).all() and codes.max().item() < 2**bits
    trip = Integer(k_bits=bits, v_bits=bits, first=0, recent=0).round_trip(x[None], x[None])[1]
    assert ((trip - x).abs() <= bound(x[None], 2, 64, bits)).all()


@pytest.mark.parametrize("name", ("int8", "int2", "int3:rotate=true", "fp8", "entropy"))
@pytest.mark.parametrize("value", (1e9, -1e9, 1e38, torch.inf, -torch.inf, torch.nan))
@pytest.mark.parametrize("side", (0, 1))
def test_what_fp16_cannot_hold_is_refused_and_never_clipped(name, value, side):
    kv = pairs(1, 100, 8)
    kv[side][0, 50, 3] = value
    with pytest.raises(WireError, match="KV holds"):
        parse_codec(name).round_trip(*kv)


@pytest.mark.parametrize("name", ("int8", "int4", "int2"))
@pytest.mark.parametrize("value", (6e4, 1e5, 4e5))
def test_what_a_grid_reaches_beyond_fp16_is_not_clipped(name, value):
    """A grid of an fp16 minimum and an fp16 step covers more than fp16 does."""
    k, v = torch.zeros(2, 1, 100, 8)
    v[0, 50, 3] = value
    try:
        back = parse_codec(name).round_trip(k, v)[1][0, 50, 3]
    except WireError:
        assert value / (2 ** parse_codec(name).v_bits - 1) > 65504
    else:
        assert abs(back - value) <= value * 2**-9


def test_tiny_fp8_scales_clip_no_more_than_rounding():
    """Scales near fp16's least number have a bit or two: rounded down they cut a third off."""
    for amax in (448 * 2.0**-24 * x for x in (0.1, 1.0, 1.4, 1.49, 2.4, 9.4)):
        x = torch.full((1, 4, 8), amax)
        back = Fp8().round_trip(x, x)[0]
        assert ((back - x).abs() <= x / 16 + 2.0**-34).all(), amax


@pytest.mark.parametrize(("name", "value"), [("int4", 0.0), ("int4", -300.0), ("fp8", 0.0)])
def test_equal_elements_come_back_exact(name, value):
    x = torch.full((2, 100, 8), value)
    assert torch.equal(parse_codec(name).round_trip(x, x)[0], x)


@pytest.mark.parametrize("name", ("fp8", "int4", "entropy", "lossless"))
@pytest.mark.parametrize("byte", (0x00, 0xFF))
def test_garbage_of_the_right_length_is_refused(name, byte):
    codec = parse_codec(name)
    data = torch.full((codec.nbytes(2, 100, 8, torch.float32),), byte, dtype=torch.uint8)
    with pytest.raises(WireError):
        codec.decode(data, 2, 100, 8, torch.float32)


def test_no_number_is_refused_and_not_hidden():
    k, v = pairs(1, 100, 8)
    k[0, 50, 3] = torch.nan
    for name in ("fp8", "int4", "entropy"):
        with pytest.raises(WireError):
            parse_codec(name).round_trip(k, v)


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_holds_any_codec(name):
    codec, adapter = parse_codec(name), TypeAdapter(Codec)
    assert adapter.validate_json(adapter.dump_json(codec)) == codec
    assert CODECS[codec.name] is type(codec)


def test_a_plan_refuses_what_is_no_codec():
    for bad in ({"name": "int", "k_bits": 5}, {"name": "zip"}, {"name": "raw", "group": 3}, {}):
        with pytest.raises(ValidationError):
            TypeAdapter(Codec).validate_python(bad)


def test_parse_codec_reads_presets_and_options():
    assert parse_codec("raw") == parse_codec(" BF16 ") == Raw()
    assert parse_codec("int3") == Integer(k_bits=3, v_bits=3)
    assert parse_codec("k4v2") == Integer(k_bits=4, v_bits=2)
    wanted = Integer(group=32, rotate=True, first=0, recent=7)
    assert parse_codec("int4:group=32,rotate=true,first=0,recent=7") == wanted
    assert parse_codec("int4:group=32:rotate=true, first=0,recent=7") == wanted


@pytest.mark.parametrize(
    "text",
    [
        *("", "zip", "int", "int5", "int44", "k4", "k4v", "k1v4", "int4:", "int4:group"),
        *("int4:group=0", "int4:group=x", "int4:depth=3", "int4:k_bits=2", "raw:name=int"),
        *("int4:group=8,group=8", "raw:group=8", "lossless:depth=9", "int4:first=-1"),
    ],
)
def test_parse_codec_refuses_on_one_line(text):
    with pytest.raises(PlanError) as caught:
        parse_codec(text)
    assert "\n" not in str(caught.value) and repr(text) in str(caught.value)
