"""The lanes of ``kv/codecs/rans.py`` on a GPU: a thread a lane, the same words.

One program runs the lanes of one head over ``LANE`` tokens, so that each step reads or writes a row
of codes. A lane's words are made from the last to the first and left in a column of its own: lanes
that stand beside each other are about as far, so that the columns fill row by row. A second launch
moves every lane's words together.

Shapes: P heads, N tokens, C lanes a channel, D head width, K = P C D lanes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdtrim.kv.codecs import rans
from pdtrim.kv.kernels.launch import on, tokens_of

if TYPE_CHECKING:
    from pdtrim.kv.codecs.base import CodecBase

MOST: int = rans.LANE // 2
"""Words of a lane, at most."""
LANES, WORDS = 32, 32
"""A tile of what the second launch moves."""

SIZE, BITS = tl.constexpr(rans.LANE), tl.constexpr(rans.BITS)
REACH, SCALE = tl.constexpr(rans.REACH), tl.constexpr(rans.SCALE)
LOW, STORED = tl.constexpr(rans.LOW), tl.constexpr(rans.STORED)
NORMAL, KINDS = tl.constexpr(rans.NORMAL), tl.constexpr(rans.NORMAL + rans.EXPONENT)
CAP = tl.constexpr(MOST)


@cache
def tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Those of the codec, on a device.

    The first, int64, has in its upper half what a state is multiplied by to divide it.
    """
    encode, decode, limits = (torch.from_numpy(x) for x in rans.tables())
    wide = encode.to(torch.int64)
    inverse = (2**32 // (wide >> 10 & 2047) + 1).clamp(max=2**32 - 1)
    return (inverse << 32 | wide).to(device), decode.to(device), limits.to(device)


def takes(codec: CodecBase, tokens: int, width: int) -> bool:
    """Whether a head's tokens are whole rows of threads, and 32 bits count its elements."""
    return width % 8 == 0 and 8 <= width <= 256 and tokens * width < 2**28


def warps_of(width: int) -> int:
    """A thread a lane; a launch takes powers of two only, and so do tiles."""
    return max(1, triton.next_power_of_2(width) // 32)


@dataclass(frozen=True, kw_only=True)
class Coded:
    """What the first launch makes.

    Attributes:
        heads: uint8 ``[3 K]``.
        loose: uint16 words ``[P C, MOST, D]``, the last rows of each column used.
        ends: where in the words each lane ends, int64 ``[K]``.
    """

    heads: Tensor
    loose: Tensor
    ends: Tensor

    def after(self, plain: Sequence[Tensor], most: int) -> Tensor:
        """All wire bytes: plain parts, heads and words, of ``most`` bytes at most.

        The words' launch does not wait until their number is known, so that the bytes are the
        begin of a buffer for the most that they can be.
        """
        parts = [x.reshape(-1).view(torch.uint8) for x in (*plain, self.heads)]
        before = sum(len(part) for part in parts)
        data = torch.empty(most, dtype=torch.uint8, device=self.heads.device)
        torch.cat(parts, out=data[:before])
        lanes = len(self.ends)
        if not lanes:
            return data[:before]
        words = data[before : before + (most - before) // 2 * 2].view(torch.uint16)
        if len(words):
            with on(data.device):
                move_kernel[(triton.cdiv(lanes, LANES),)](
                    self.heads, self.ends, self.loose, words, lanes,
                    D=self.loose.shape[2], LANES=LANES, WORDS=WORDS,
                )  # fmt: skip
        return data[: before + 2 * int(self.ends[-1])]


def encode(codes_PND: Tensor, family: rans.Family) -> Coded:
    """Lanes of int8 codes, contiguous."""
    P, N, D = codes_PND.shape
    C = rans.lanes(N)
    lanes, device = P * C * D, codes_PND.device
    heads = torch.empty(3 * lanes, dtype=torch.uint8, device=device)
    loose = torch.empty(P * C, MOST, D, dtype=torch.uint16, device=device)
    table, _, limits = tables(device)
    if lanes:
        with on(device):
            measure_kernel[(P * C,)](
                codes_PND, limits, heads, N, C, lanes,
                D=D, ROWS=tokens_of(D) // 2, EXPONENT=family == "exponent",
            )  # fmt: skip
            encode_kernel[(P * C,)](
                codes_PND, table, loose, heads, N, C, lanes, D=D, num_warps=warps_of(D)
            )
    return Coded(heads=heads, loose=loose, ends=heads[:lanes].to(torch.int64).cumsum(0))


def decode(heads: Tensor, body: Tensor, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """int8 codes ``[P, N, D]``, and int32 ``[1]`` that is not 0 where no encoder made the bytes."""
    P, N, D = shape
    C = rans.lanes(N)
    lanes, device = P * C * D, body.device
    codes = torch.empty(shape, dtype=torch.int8, device=device)
    broken = torch.zeros(1, dtype=torch.int32, device=device)
    words, odd = divmod(body.numel(), 2)
    ends = heads[:lanes].to(torch.int64).cumsum(0)
    if not lanes:
        return codes, broken + (words + odd)
    _, table, _ = tables(device)
    with on(device):
        decode_kernel[(P * C,)](
            heads, ends, body[: 2 * words].view(torch.uint16), table, codes, broken,
            N, C, lanes, words, D=D, num_warps=warps_of(D),
        )  # fmt: skip
    return codes, broken + odd + (ends[-1:] != words)


NUMBERS = ["N", "C", "lanes", "words"]
LOOSE = ["loose_ptr", "body_ptr", "codes_ptr"]


@triton.jit(do_not_specialize=NUMBERS)
def measure_kernel(
    codes_ptr, limits_ptr, heads_ptr, N, C, lanes,
    D: tl.constexpr, ROWS: tl.constexpr, EXPONENT: tl.constexpr,
):  # fmt: skip
    """Offsets and kinds of a head's lanes over ``SIZE`` tokens; no words where codes are alike."""
    pid = tl.program_id(0)
    p, c = pid // C, pid % C
    d = tl.arange(0, triton.next_power_of_2(D))
    count = tl.minimum(SIZE, N - c * SIZE)
    codes_ptr += (p.to(tl.int64) * N + c * SIZE) * D
    totals = tl.zeros([ROWS, triton.next_power_of_2(D)], tl.int32)
    squares = tl.zeros_like(totals)
    for first in range(0, count, ROWS):
        t = first + tl.arange(0, ROWS)
        ok = (t < count)[:, None] & (d < D)[None, :]
        code = tl.load(codes_ptr + t[:, None] * D + d[None, :], mask=ok, other=0).to(tl.int32)
        totals += code
        squares += code * code
    total = tl.sum(totals, axis=0)
    quarters = (8 * (total + 128 * count) + 4 * count) // (2 * count)
    spread = (count * tl.sum(squares, axis=0) - total * total).to(tl.int64)
    kind = tl.zeros_like(d)
    if EXPONENT:
        kind += NORMAL + (quarters & 3)
    else:
        area = (count * count).to(tl.int64)
        for k in range(NORMAL - 1):
            kind += (spread * SCALE > tl.load(limits_ptr + k) * area).to(tl.int32)
    lane = pid.to(tl.int64) * D + d
    tl.store(heads_ptr + lane, (spread > 0).to(tl.uint8), mask=d < D)
    tl.store(heads_ptr + lanes + lane, kind.to(tl.uint8), mask=d < D)
    tl.store(heads_ptr + 2 * lanes.to(tl.int64) + lane, (quarters >> 2).to(tl.uint8), mask=d < D)


@triton.jit(do_not_specialize=NUMBERS)
def encode_kernel(
    codes_ptr, table_ptr, loose_ptr, heads_ptr, N, C, lanes, D: tl.constexpr
):  # fmt: skip
    """Words of all lanes of a head over ``SIZE`` tokens, that were measured."""
    pid = tl.program_id(0)
    p, c = pid // C, pid % C
    d = tl.arange(0, triton.next_power_of_2(D))
    ok = d < D
    lane = pid.to(tl.int64) * D + d
    count = tl.minimum(SIZE, N - c * SIZE)
    halves = (count + 1) // 2
    codes_ptr += (p.to(tl.int64) * N + c * SIZE) * D + d
    varied = tl.load(heads_ptr + lane, mask=ok, other=0) > 0
    kind = tl.load(heads_ptr + lanes + lane, mask=ok, other=0).to(tl.int32)
    offset = tl.load(heads_ptr + 2 * lanes.to(tl.int64) + lane, mask=ok, other=128)
    row_ptr = table_ptr + kind * (2 * REACH) + REACH - (offset.to(tl.int32) - 128)
    loose_ptr += pid.to(tl.int64) * (CAP * D) + d
    state = tl.full(d.shape, LOW, tl.uint32)
    used = tl.zeros_like(d)
    for i in range(count):
        code = tl.load(codes_ptr + (count - 1 - i) * D, mask=ok, other=0).to(tl.int32)
        pair = tl.load(row_ptr + code)
        entry, inverse = pair.to(tl.int32), (pair >> 32).to(tl.uint32)
        start, f = (entry & 1023).to(tl.uint32), ((entry >> 10) & 2047).to(tl.uint32)
        escape = (entry >> 21) > 0
        state, used = _shed(loose_ptr, state, used, escape & (state >= 1 << 24), ok, D)
        state = tl.where(escape, (state << 8) | (code + 128).to(tl.uint32), state)
        state, used = _shed(loose_ptr, state, used, state >= (f << 22), ok, D)
        quotient, rest = _divided(state, f, inverse)
        state = (quotient << BITS) + start + rest
    always = used >= 0
    state, used = _shed(loose_ptr, state, used, always, ok, D)
    state, used = _shed(loose_ptr, state, used, always, ok, D)
    stored = (used >= halves) & varied & ok
    used = tl.where(stored, halves, tl.where(varied, used, 0))
    tl.store(heads_ptr + lane, used.to(tl.uint8), mask=ok)
    tl.store(heads_ptr + lanes + lane, STORED, mask=stored)
    if tl.max(stored.to(tl.int32), axis=0) > 0:
        for pair in range(halves):
            t = 2 * pair
            low = tl.load(codes_ptr + t * D, mask=stored, other=0).to(tl.int32) & 255
            more = stored & (tl.zeros_like(d) + t + 1 < count)
            high = tl.load(codes_ptr + (t + 1) * D, mask=more, other=0).to(tl.int32) & 255
            word = (low | (high << 8)).to(tl.uint16)
            tl.store(loose_ptr + (CAP - halves + pair) * D, word, mask=stored)


@triton.jit
def _shed(loose_ptr, state, used, full, ok, D: tl.constexpr):
    """The low word leaves full lanes; what no lane has place for is counted and not kept."""
    word = (state & 0xFFFF).to(tl.uint16)
    tl.store(loose_ptr + (CAP - 1 - used) * D, word, mask=full & ok & (used < CAP))
    return tl.where(full, state >> 16, state), used + full.to(tl.int32)


@triton.jit
def _divided(x, f, inverse):
    """Quotient and rest of uint32 ``x < f << 22``; by ``2**32 // f + 1`` they are one off at most.

    Of the quotient's error, ``x / 2**32`` is below ``f / 1024``, so below 1.
    """
    quotient = tl.umulhi(x, inverse)
    rest = (x - quotient * f).to(tl.int32, bitcast=True)
    step = (rest >= f.to(tl.int32)).to(tl.int32) - (rest < 0).to(tl.int32)
    rest -= step * f.to(tl.int32)
    return quotient + step.to(tl.uint32), rest.to(tl.uint32)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=LOOSE)
def move_kernel(
    heads_ptr, ends_ptr, loose_ptr, body_ptr, lanes,
    D: tl.constexpr, LANES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """``LANES`` lanes' words to where they belong."""
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    ok = lane < lanes
    used = tl.load(heads_ptr + lane, mask=ok, other=0).to(tl.int32)
    end = tl.load(ends_ptr + lane, mask=ok, other=0)
    for begin in range(0, tl.max(used, axis=0), WORDS):
        w = begin + tl.arange(0, WORDS)
        here = w[None, :] < used[:, None]
        first = (lane // D * CAP + CAP - used) * D + lane % D
        at = first[:, None] + w[None, :] * D
        word = tl.load(loose_ptr + at, mask=here, other=0)
        tl.store(body_ptr + (end - used)[:, None] + w[None, :], word, mask=here)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=LOOSE)
def decode_kernel(
    heads_ptr, ends_ptr, body_ptr, table_ptr, codes_ptr, broken_ptr, N, C, lanes, words,
    D: tl.constexpr,
):  # fmt: skip
    """All lanes of a head over ``SIZE`` tokens; nothing outside of ``words`` is read."""
    pid = tl.program_id(0)
    p, c = pid // C, pid % C
    d = tl.arange(0, triton.next_power_of_2(D))
    ok = d < D
    lane = pid.to(tl.int64) * D + d
    count = tl.minimum(SIZE, N - c * SIZE)
    halves = (count + 1) // 2
    used = tl.load(heads_ptr + lane, mask=ok, other=0).to(tl.int32)
    kind = tl.load(heads_ptr + lanes + lane, mask=ok, other=0).to(tl.int32)
    offset = tl.load(heads_ptr + 2 * lanes.to(tl.int64) + lane, mask=ok, other=128)
    offset = offset.to(tl.int32) - 128
    end = tl.load(ends_ptr + lane, mask=ok, other=0)
    place, end = tl.minimum(end - used, words), tl.minimum(end, words)
    first = place
    stored = kind == STORED
    bad = tl.where(stored, used != halves, (kind >= KINDS) | (used == 1))
    row_ptr = table_ptr + (tl.where(kind < KINDS, kind, 0) << BITS)
    coded = ok & (used > 1) & (stored == 0)
    state = tl.zeros_like(d).to(tl.uint32)
    state, place = _take(body_ptr, state, place, end, coded)
    state, place = _take(body_ptr, state, place, end, coded)
    codes_ptr += (p.to(tl.int64) * N + c * SIZE) * D + d
    for t in range(count):
        entry = tl.load(row_ptr + (state & 1023).to(tl.int32))
        code = (entry & 255) - 128 + offset
        f, within = ((entry >> 8) & 2047).to(tl.uint32), ((entry >> 19) & 1023).to(tl.uint32)
        state = tl.where(coded, f * (state >> BITS) + within, state)
        state, place = _take(body_ptr, state, place, end, coded & (state < LOW))
        escape = coded & ((entry >> 29) > 0)
        code = tl.where(escape, (state & 255).to(tl.int32) - 128, code)
        state = tl.where(escape, state >> 8, state)
        state, place = _take(body_ptr, state, place, end, escape & (state < LOW))
        code = tl.where(coded, code, offset)
        bad |= coded & ((code < -128) | (code > 127))
        tl.store(codes_ptr + t * D, code.to(tl.int8), mask=ok)
    bad |= coded & ((state != LOW) | (place != end))
    stored &= ok
    if tl.max(stored.to(tl.int32), axis=0) > 0:
        for t in range(count):
            at = first + t // 2
            word = tl.load(body_ptr + at, mask=stored & (at < end), other=0).to(tl.int32)
            code = (word >> (t % 2 * 8)) & 255
            tl.store(codes_ptr + t * D, code.to(tl.int8), mask=stored)
    if tl.max((bad & ok).to(tl.int32), axis=0) > 0:
        tl.store(broken_ptr, 1)


@triton.jit
def _take(body_ptr, state, place, end, wanted):
    """A word comes into lanes that want one and have one."""
    wanted &= place < end
    word = tl.load(body_ptr + place, mask=wanted, other=0).to(tl.uint32)
    return tl.where(wanted, (state << 16) | word, state), place + wanted.to(tl.int64)
