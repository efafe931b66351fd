"""Codes whose length depends on the data: lossless and entropy, and the range coder below them.

Shapes: L heads, M tokens, D head width.
"""

from __future__ import annotations

import hashlib

import pytest
import torch

from helpers import pairs
from pdtrim.errors import WireError
from pdtrim.kv.codecs import (
    Lossless,
    Raw,
    parse_codec,
    rans,
)

DTYPES = (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_lossless_is_exact_and_smaller(dtype):
    k, v = pairs(3, 500, 64, dtype)
    k[0, 0, :3] = torch.tensor([torch.nan, -torch.inf, -0.0])
    codec = Lossless()
    data = codec.encode(k, v)
    assert data.numel() < 0.95 * Raw().nbytes(3, 500, 64, dtype)
    back = codec.decode(data, 3, 500, 64, dtype)
    for x, y in zip((k, v), back, strict=True):
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))
    noise = torch.randint(0, 256, (2, 3, 500, 128), dtype=torch.uint8).view(torch.bfloat16)
    assert codec.encode(*noise).numel() == codec.nbytes(3, 500, 64, torch.bfloat16)


def test_entropy_needs_fewer_bytes_than_a_grid_of_equal_error():
    """Of normal values: the step that gives int3's error must cost at least a quarter bit less."""
    k, v = pairs(4, 800, 64)
    grid = parse_codec("int3:first=0,recent=0")
    step = parse_codec("entropy:k_step=0.02,v_step=0.66,first=0")
    errors = [(codec.round_trip(k, v)[1] - v).square().mean() for codec in (grid, step)]
    assert errors[1] < errors[0]
    data = step.encode(torch.zeros_like(k), v)
    zeros = 3 * 4 * rans.lanes(800) * 64  # heads of the keys' lanes
    assert (data.numel() - zeros) * 8 / v.numel() < 3 + 32 / 64 - 0.25


@pytest.mark.parametrize("name", ("entropy", "lossless"))
def test_a_variable_length_code_refuses_what_no_encoder_made(name):
    L, M, D = 2, 300, 8
    codec = parse_codec(name)
    good = codec.encode(*pairs(L, M, D, torch.bfloat16))
    lanes = rans.head_bytes(2 * L, M - getattr(codec, "first", 0), D) // 3
    *plain, heads, words = codec.parts(good, L, M, D, torch.bfloat16)
    at = sum(map(len, plain))
    assert len(heads) == 3 * lanes and len(words) == 2 * int(heads[:lanes].sum())

    def refused(data, words="KV codes"):
        with pytest.raises(WireError, match=words):
            codec.decode(data, L, M, D, torch.bfloat16)

    def changed(place, value):
        data = good.clone()
        data[place] = value
        return data

    for cut in (0, 3, at - 1, at + 3 * lanes - 1):
        refused(good[:cut], "cut short")
    for data in (good[:-2], torch.cat((good, good[:2]))):
        refused(data)
    refused(good[:-1], "KV codes")
    lane = int(heads[:lanes].argmax())
    for value in (0, 1, 3, 255):  # words
        refused(changed(at + lane, value))
    for value in (rans.NORMAL + rans.EXPONENT, 200, rans.STORED):  # kinds
        refused(changed(at + lanes + lane, value))
    last = len(good) - 2
    refused(changed(last, good[last] ^ 1))  # a lane then ends in another state


def test_a_code_that_leaves_its_eight_bits_is_refused():
    """An offset of 127 and a symbol above 0."""
    codes = torch.tensor([1, 2, 1, 0] * 20, dtype=torch.int8).view(1, 80, 1)
    heads, words = rans.encode(codes, "normal")
    assert torch.equal(rans.decode(heads, words, (1, 80, 1)), codes)
    heads.view(-1)[2] = 255
    with pytest.raises(WireError, match="do not end"):
        rans.decode(heads, words, (1, 80, 1))


@pytest.mark.parametrize("family", ["normal", "exponent"])
@pytest.mark.parametrize("spread", [0, 0.1, 1, 6, 40, 200])
@pytest.mark.parametrize("tokens", [0, 1, 2, 255, 256, 257, 600])
def test_any_codes_come_back(family, spread, tokens):
    """Of every spread, with whole lanes of one code and numbers far outside of the tables."""
    draw = torch.Generator().manual_seed(tokens)
    codes = (torch.randn(2, tokens, 8, generator=draw) * spread).round().clamp(-128, 127)
    codes[:, ::97] = -128
    codes[:, :, 3] = 127
    codes = codes.to(torch.int8)
    heads, words = rans.encode(codes, family)
    assert heads.numel() == rans.head_bytes(2, tokens, 8)
    assert words.numel() <= rans.most_bytes(2, tokens, 8)
    assert torch.equal(rans.decode(heads, words, (2, tokens, 8)), codes)


@pytest.mark.parametrize("step", [0.4, 1.0, 3.0])
def test_codes_of_normal_numbers_need_their_entropy_and_little_more(step):
    draw = torch.Generator().manual_seed(1)
    codes = (torch.randn(2, 1024, 32, generator=draw) / step).round().to(torch.int8)
    odds = torch.unique(codes, return_counts=True)[1] / codes.numel()
    entropy = float(-(odds * odds.log2()).sum())
    heads, words = rans.encode(codes, "normal")
    # of a lane: three bytes of its head, two of its last state, and a last word that is not full
    assert 8 * (words.numel() + heads.numel()) / codes.numel() < 1.03 * entropy + 48 / 256


def test_the_tables_are_those_that_both_sides_have():
    """Frequencies fill their range; whatever computes them, the integers are the same."""
    table = rans.tables()
    counts = (table.decode >> 8 & 2047, table.decode >> 19 & 1023)
    assert (counts[1] < counts[0]).all()
    whole = b"".join(x.astype("<i4").tobytes() for x in table)
    assert (
        hashlib.sha256(whole).hexdigest()
        == "a4096d1dbc410cacd5e1060a646bf1c3dd8194f40ea2fe798e81349631d7e43a"
    )
