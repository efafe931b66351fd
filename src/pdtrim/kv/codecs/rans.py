"""int8 codes at about their entropy: range ANS over fixed tables, in lanes that nobody waits for.

A *lane* is one channel of a head over ``LANE`` tokens: it has its own state, so that a GPU runs all
lanes at once and a tile of them reads and writes whole rows. Of a lane travel three bytes and a run
of 16-bit words. The bytes are the number of words, the *kind* (a table) and an offset. A code is
the offset plus a symbol. Kinds 0 to ``NORMAL - 1`` are normal distributions of standard deviation
``2 ** (kind / 2 - 3)``; the next four are exponents of normal numbers, by a quarter of an octave. A
lane of one code alone has no words. A lane that its table would not shrink is *stored*, a byte a
code.

A symbol of frequency f at c of ``2**BITS`` takes the state x to ``(x // f << BITS) + c + x % f``,
after the low word of x has left where x would pass 32 bits. A symbol that the table does not have
is an escape, and the code's own eight bits follow.

Papers: Duda's ANS (arXiv 1311.2540); many states at once as in DietGPU and Recoil (2306.12141).
Different from both: tables are fixed, so no histogram is made or sent, and a lane is a channel, for
channels differ by orders of magnitude and tokens of one do not.

Shapes: P heads (of keys, then of values), N tokens, C lanes a channel of them, D head width, K =
P C D lanes, S = LANE.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pdtrim.errors import WireError

LANE = 256
BITS = 10
LOW = 1 << 16
"""The least state; a state is below its square."""
NORMAL, EXPONENT = 18, 4
STORED = 255
"""The kind of a lane that is stored."""
REACH = 256
"""Symbols are above minus this and below it."""
SCALE = 4096
"""Of the limits between normal kinds."""

Family = Literal["normal", "exponent"]
Array = NDArray[np.int64]


class Tables(NamedTuple):
    """Integers that both sides have.

    Attributes:
        encode: ``[kinds, 2 REACH]`` by symbol: start, frequency << 10, and 1 << 21 for an escape.
        decode: ``[kinds, 2**BITS]`` by the state's low bits: symbol + 128, frequency << 8, place
            within the frequency << 19, and 1 << 29 for an escape.
        limits: ``[NORMAL - 1]``, ``SCALE`` times the variance from which the next kind is better.
    """

    encode: NDArray[np.int32]
    decode: NDArray[np.int32]
    limits: NDArray[np.int64]


@cache
def tables() -> Tables:
    """Made once a process."""
    spread = [2.0 ** (kind / 2 - 3) for kind in range(NORMAL)]
    odds = [_normal(r) for r in spread] + [_exponent(f / EXPONENT) for f in range(EXPONENT)]
    encode = np.zeros((len(odds), 2 * REACH), np.int32)
    decode = np.zeros((len(odds), 1 << BITS), np.int32)
    for kind, chance in enumerate(odds):
        whole, start = 1 << BITS, 0
        counts = {s: round(p * whole) for s, p in chance.items() if round(p * whole)}
        likely = max(counts, key=lambda s: counts[s])
        counts[likely] -= max(0, sum(counts.values()) + 1 - whole)
        rest = whole - sum(counts.values())
        for symbol, count in sorted(counts.items()):
            encode[kind, symbol + REACH] = start | count << 10
            for place in range(count):
                decode[kind, start + place] = symbol + 128 | count << 8 | place << 19
            start += count
        encode[kind, encode[kind] == 0] = start | rest << 10 | 1 << 21
        for place in range(rest):
            decode[kind, start + place] = rest << 8 | place << 19 | 1 << 29
    variances = [sum(s * s * p for s, p in chance.items()) for chance in odds[:NORMAL]]
    limits = [round(SCALE * math.sqrt(a * b)) for a, b in pairwise(variances)]
    return Tables(encode, decode, np.array(limits, np.int64))


def _normal(r: float) -> dict[int, float]:
    """Of whole steps, for a standard deviation of ``r`` steps."""

    def below(x: float) -> float:
        return 0.5 * (1 + math.erf(x / r / math.sqrt(2)))

    return {s: below(s + 0.5) - below(s - 0.5) for s in range(-127, 128)}


def _exponent(quarter: float) -> dict[int, float]:
    """Of the exponents of normal numbers, less the whole part of their mean plus a half.

    The mean exponent of normal numbers is ``MEAN`` below their standard deviation's.
    """
    shift = quarter - 0.5 + 0.125 + MEAN

    def below(e: float) -> float:
        return math.erf(2.0 ** (e - shift) / math.sqrt(2))

    return {s: below(s + 1) - below(s) for s in range(-20, 8)}


MEAN = 1.1315
"""``-E[floor(log2 |x|)]`` of standard normal x, mean over the scales of an octave."""


def lanes(tokens: int) -> int:
    """C: lanes of a channel."""
    return -(-tokens // LANE)


def head_bytes(heads: int, tokens: int, width: int) -> int:
    """Bytes of all lanes' heads ``[3, P, C, D]``: words, kinds, offsets + 128."""
    return 3 * heads * lanes(tokens) * width


def most_bytes(heads: int, tokens: int, width: int) -> int:
    """The most bytes that all words can be."""
    whole, rest = divmod(tokens, LANE)
    return 2 * heads * width * (whole * (LANE // 2) + -(-rest // 2))


def cut(data: Tensor, before: Sequence[int], codec: str) -> tuple[Tensor, ...]:
    """A codec's bytes in wire order, the words last, each part from an aligned address.

    Args:
        before: bytes of the parts before the words.

    Raises:
        WireError: too few bytes for those.
    """
    words = data.numel() - sum(before)
    if words < 0:
        raise WireError(f"{codec} KV of {data.numel()} bytes is cut short")
    return tuple(part.clone() for part in data.split([*before, words]))


def encode(codes_PND: Tensor, family: Family) -> tuple[Tensor, Tensor]:
    """Heads uint8 ``[3, P, C, D]`` and all words as uint8, 1-D, of int8 codes."""
    P, N, D = codes_PND.shape
    code_SK, counts = _by_lane(codes_PND)
    halves = -(-counts // 2)
    total = code_SK.sum(0, dtype=np.int64)
    spread = counts * np.square(code_SK, dtype=np.int64).sum(0) - total**2
    quarters = (8 * (total + 128 * counts) + 4 * counts) // (2 * counts.clip(1))
    offset = (quarters >> 2) - 128
    symbol_SK = code_SK - offset.astype(np.int16)
    for tail in np.unique(counts):  # nothing stands behind the last of a lane
        symbol_SK[tail:, counts == tail] = 0
    if family == "normal":
        kind = (spread * SCALE > tables().limits[:, None] * counts**2).sum(0)
    else:
        kind = NORMAL + (quarters & 3)
    used = np.zeros_like(counts)
    words_KW = np.zeros((len(counts), LANE // 2), "<u2")
    coded = np.flatnonzero(spread)
    coded = coded[np.argsort(-counts[coded], kind="stable")]  # so that those at a step are a slice
    made_KW, used[coded] = _states(
        symbol_SK[:, coded], code_SK[:, coded], counts[coded], kind[coded]
    )
    words_KW[coded] = made_KW
    stored = np.flatnonzero((used >= halves) & (spread > 0))
    raw_KB = np.zeros((len(stored), 2 * (-(-len(code_SK) // 2))), np.int8)
    raw_KB[:, : len(code_SK)] = code_SK[:, stored].T
    words_KW[stored, : raw_KB.shape[1] // 2] = raw_KB.view("<u2")
    kind[stored], used[stored] = STORED, halves[stored]
    body = words_KW[np.arange(LANE // 2) < used[:, None]]
    heads = np.stack((used, kind, offset + 128)).astype(np.uint8).reshape(3, P, lanes(N), D)
    return torch.from_numpy(heads), torch.from_numpy(body.view(np.uint8))


def _states(
    symbol_SK: NDArray[np.int16], code_SK: NDArray[np.int16], counts: Array, kind: Array
) -> tuple[NDArray[np.uint16], Array]:
    """The words of every lane ``[K, LANE / 2]`` in the order in which they are read, and how many.

    Longer lanes stand before shorter ones. What is more than ``LANE / 2`` words is cut off.
    """
    steps, lanes = symbol_SK.shape
    entry_SK = tables().encode.reshape(-1)[kind * (2 * REACH) + REACH + symbol_SK]
    start_SK, f_SK = entry_SK & 1023, entry_SK >> 10 & 2047
    escapes_S = (entry_SK >> 21).any(1)
    words = np.zeros((2 * steps + 2) * lanes, np.uint16)  # [.., K]
    end, state = np.arange(lanes), np.full(lanes, LOW, np.int64)

    def shed(full: NDArray[np.bool_]) -> None:
        """The low word leaves full lanes, the first ones; the next overwrites it in others."""
        here = slice(0, len(full))
        words[end[here]] = state[here]
        end[here] += full * lanes
        state[here] >>= full.view(np.int8) << 4

    for step in reversed(range(steps)):
        n = int(np.searchsorted(-counts, -step))  # lanes that have this step
        f = f_SK[step, :n].astype(np.int64)
        if escapes_S[step]:
            escape = entry_SK[step, :n] >> 21 > 0
            shed(escape & (state[:n] >= 1 << 24))
            at = np.flatnonzero(escape)
            state[at] = state[at] << 8 | code_SK[step, at].astype(np.int64) + 128
        shed(state[:n] >= f << 22)
        # the half keeps the product on the right side of a whole number
        quotient = ((state[:n] + 0.5) * (1.0 / f)).astype(np.int64)
        state[:n] += quotient * (1024 - f) + start_SK[step, :n]
    for _ in range(2):
        shed(np.ones(lanes, np.bool_))
    used = end // max(1, lanes)
    # the last that left is the first that is read
    order = used[:, None] - 1 - np.arange(LANE // 2)
    return words.reshape(2 * steps + 2, lanes).T[np.arange(lanes)[:, None], order.clip(0)], used


def decode(heads: Tensor, body: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """int8 codes ``[P, N, D]`` of a shape, whose number of heads' bytes is :func:`head_bytes`.

    Raises:
        WireError: heads or words that :func:`encode` cannot have made.
    """
    P, N, D = shape
    used, kind, offset = heads.cpu().numpy().reshape(3, -1).astype(np.int64)
    if body.numel() % 2:
        raise WireError("KV codes do not have the words that their lanes say")
    words = np.frombuffer(body.cpu().numpy().tobytes(), "<u2")
    counts = _counts(P, N, D)
    stored = kind == STORED
    sound = stored | (kind < NORMAL + EXPONENT)
    sound &= np.where(stored, used == -(-counts // 2), (used == 0) | (used > 1))
    if not sound.all() or used.sum() != len(words):
        raise WireError("KV codes do not have the words that their lanes say")
    start, steps = np.cumsum(used) - used, min(N, LANE)
    code_SK = np.empty((steps, len(used)), np.int8)
    code_SK[:] = offset - 128
    coded = np.flatnonzero((used > 0) & ~stored)
    coded = coded[np.argsort(-counts[coded], kind="stable")]
    code_SK[:, coded] = _codes(
        steps, words, start[coded], used[coded], kind[coded], counts[coded], offset[coded] - 128
    )
    at = np.flatnonzero(stored)
    half = -(-steps // 2)
    pairs = np.append(words, 0)[np.minimum(start[at, None] + np.arange(half), len(words))]
    raw_KB = pairs.astype("<u2").view(np.int8).reshape(len(at), 2 * half)
    code_SK[:, at] = raw_KB[:, :steps].T
    codes_PCSD = code_SK.reshape(steps, P, lanes(N), D).transpose(1, 2, 0, 3)
    codes_PND = codes_PCSD.reshape(P, lanes(N) * steps, D)[:, :N]
    return torch.from_numpy(np.ascontiguousarray(codes_PND))


def _codes(
    steps: int,
    words: NDArray[np.uint16],
    start: Array,
    used: Array,
    kind: Array,
    counts: Array,
    offset: Array,
) -> NDArray[np.int8]:
    """Codes of lanes that have states, ``[S, K]``; longer lanes stand before shorter ones."""
    table, base = tables().decode.reshape(-1), kind << BITS
    entry_SK = np.zeros((steps, len(used)), np.int32)
    raw: dict[int, tuple[Array, Array]] = {}
    words = np.append(words, 0)  # read where a lane has none left
    place, end = start.copy(), start + used
    state = words[place].astype(np.int64) << 16 | words[place + 1]
    place += 2

    def take(wanted: NDArray[np.bool_]) -> None:
        here = slice(0, len(wanted))
        wanted &= place[here] < end[here]
        word = words[np.minimum(place[here], len(words) - 1)]
        place[here] += wanted
        np.copyto(state[here], state[here] << 16 | word, where=wanted)

    for step in range(steps):
        n = int(np.searchsorted(-counts, -step))
        entry = table[base[:n] + (state[:n] & 1023)]
        entry_SK[step, :n] = entry
        state[:n] = (entry >> 8 & 2047) * (state[:n] >> BITS) + (entry >> 19 & 1023)
        take(state[:n] < LOW)
        at = np.flatnonzero(entry >> 29)
        if len(at):
            raw[step] = at, (state[at] & 255) - 128
            state[at] >>= 8
            escaped = np.zeros(n, np.bool_)
            escaped[at] = state[at] < LOW
            take(escaped)
    code_SK = (entry_SK & 255) - 128 + offset
    for step, (at, codes) in raw.items():
        code_SK[step, at] = codes
    for tail in np.unique(counts):
        code_SK[tail:, counts == tail] = 0
    if not ((state == LOW) & (place == end)).all() or (code_SK != code_SK.astype(np.int8)).any():
        raise WireError("KV codes do not end where their words do")
    return code_SK.astype(np.int8)


def _by_lane(codes_PND: Tensor) -> tuple[NDArray[np.int16], Array]:
    """Codes ``[S, K]``, zeros behind the last, and each lane's number of them."""
    P, N, D = codes_PND.shape
    C, steps = lanes(N), min(N, LANE)
    wide = np.zeros((P, C * steps, D), np.int16)
    wide[:, :N] = codes_PND.cpu().numpy()
    by_step = wide.reshape(P, C, steps, D).transpose(2, 0, 1, 3)
    return by_step.reshape(steps, P * C * D), _counts(P, N, D)


def _counts(heads: int, tokens: int, width: int) -> Array:
    """Codes of each lane ``[K]``."""
    counts = np.minimum(LANE, tokens - LANE * np.arange(lanes(tokens)))
    return np.tile(np.repeat(counts, width), heads).astype(np.int64)
