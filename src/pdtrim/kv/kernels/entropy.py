"""What the entropy codec runs on a GPU: statistics, codes, and the lanes of ``kernels/rans.py``.

Keys are read twice, for their statistics and for their codes; values once. Sums are in fp64, as in
the torch path, so that fp16 hides in which order a device adds.

Shapes: L heads, M tokens, N of them coded and R raw, D head width, J runs of tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdtrim.kv.codecs.base import kept_of
from pdtrim.kv.codecs.entropy import LARGEST
from pdtrim.kv.kernels import rans
from pdtrim.kv.kernels.launch import on, rows, tokens_of
from pdtrim.kv.kernels.numbers import (
    EXACT,
    GREATEST_FP16,
    ROUND,
    channels,
    fp16_below,
    inverse_of,
    narrowed,
    quotient,
    widened,
)

if TYPE_CHECKING:
    from pdtrim.kv.codecs.entropy import Entropy

RUN = 256
"""Tokens whose statistics a program sums."""
FP64_TILE = 2048
"""Elements a program holds in registers where their sums are in fp64."""

MOST = tl.constexpr(float(LARGEST))
LEAST_STEP = tl.constexpr(2.0**-24)


def tile_of(width: int) -> int:
    """Tokens a tile where sums are in fp64."""
    return max(1, FP64_TILE // triton.next_power_of_2(width))


takes = rans.takes


def encode(codec: Entropy, k_LTD: Tensor, v_LTD: Tensor, kept_LM: Tensor | None = None) -> Tensor:
    """The wire bytes, as :meth:`Entropy.encode` makes them of the kept pairs."""
    if kept_LM is not None:
        k_LTD, v_LTD = kept_of(k_LTD, kept_LM), kept_of(v_LTD, kept_LM)
    k_LMD, v_LMD = rows(k_LTD), rows(v_LTD)
    L, M, D = k_LMD.shape
    start = min(codec.first, M)
    k_LND, v_LND, N = k_LMD[:, start:], v_LMD[:, start:], M - start
    codes_PND = torch.empty(2 * L, N, D, dtype=torch.int8, device=k_LMD.device)
    v_step_LN = torch.empty(L, N, dtype=torch.float16, device=k_LMD.device)
    mean_LD = torch.zeros(L, D, dtype=torch.float16, device=k_LMD.device)
    k_step_L = torch.full((L,), 2.0**-24, dtype=torch.float16, device=k_LMD.device)
    tile, runs = tile_of(D), triton.cdiv(N, RUN)
    if L * N:
        part_4LJD = torch.empty(4, L, runs, D, dtype=torch.float64, device=k_LMD.device)
        with on(k_LMD.device):
            statistics_kernel[(L * runs,)](
                k_LND, part_4LJD, N, L, runs, *k_LND.stride()[:2],
                D=D, ROWS=min(RUN, max(1, tile // 2)), RUN=RUN, **EXACT,
            )  # fmt: skip
            steps_kernel[(L,)](
                part_4LJD, mean_LD, k_step_L, N, L, runs, *_halves(codec.k_step), D=D, **EXACT
            )
            keys_kernel[(L * triton.cdiv(N, 2 * tile),)](
                k_LND, mean_LD, k_step_L, codes_PND, N, triton.cdiv(N, 2 * tile),
                *k_LND.stride()[:2], D=D, ROWS=2 * tile, **EXACT,
            )  # fmt: skip
            values_kernel[(L * triton.cdiv(N, tile),)](
                v_LND, v_step_LN, codes_PND[L:], N, triton.cdiv(N, tile),
                *_halves(codec.v_step), *v_LND.stride()[:2], D=D, ROWS=tile, **EXACT,
            )  # fmt: skip
    coded = rans.encode(codes_PND, "normal")
    ends_2LRD = torch.stack((k_LMD[:, :start], v_LMD[:, :start]))
    most = codec.nbytes(L, M, D, k_LMD.dtype)
    return coded.after((ends_2LRD, mean_LD, k_step_L, v_step_LN), most)


def decode(
    codec: Entropy, data: Tensor, heads: int, tokens: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values ``[L, M, D]``, and int32 ``[1]``, not 0 where no encoder made the bytes."""
    L, M, D = heads, tokens, width
    start = min(codec.first, M)
    N = M - start
    ends, mean, k_step, v_step, lanes, words = codec.parts(data, L, M, D, dtype)
    codes_PND, broken = rans.decode(lanes, words, (2 * L, N, D))
    kv_2LMD = torch.empty(2, L, M, D, dtype=dtype, device=data.device)
    kv_2LMD[:, :, :start] = ends.view(dtype).view(2, L, start, D)
    tile = tokens_of(D)
    tiles = triton.cdiv(N, tile)
    if L * N:
        with on(data.device):
            restore_kernel[(2 * L * tiles,)](
                *(x.view(torch.float16) for x in (mean, k_step, v_step)), codes_PND, kv_2LMD,
                broken, N, L, tiles, start, D=D, ROWS=tile, **EXACT,
            )  # fmt: skip
    return kv_2LMD[0], kv_2LMD[1], broken


def _halves(step: float) -> tuple[float, float]:
    """Two fp32 numbers, which a launch takes, whose sum is fp64's."""
    near = float(torch.tensor(step, dtype=torch.float32))
    return near, step - near


NUMBERS = ["N", "L", "runs", "tiles", "start", "k_head", "v_head", "step", "rest"]


@triton.jit(do_not_specialize=NUMBERS)
def statistics_kernel(
    k_ptr, part_ptr, N, L, runs, k_head, k_row,
    D: tl.constexpr, ROWS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """One head's run of tokens."""
    pid = tl.program_id(0)
    head, run = pid // runs, pid % runs
    d = tl.arange(0, triton.next_power_of_2(D))
    # summed over tokens at the end: a thread has its own until then
    total = tl.zeros([ROWS, triton.next_power_of_2(D)], tl.float64)
    squares = tl.zeros_like(total)
    least = tl.full(total.shape, float("inf"), tl.float32)
    most = tl.full(total.shape, -float("inf"), tl.float32)
    k_ptr += head.to(tl.int64) * k_head
    for first in range(0, RUN, ROWS):
        n = run * RUN + first + tl.arange(0, ROWS)
        ok = (n < N)[:, None] & (d < D)[None, :]
        at = tl.minimum(n, N - 1).to(tl.int64)[:, None] * k_row + tl.minimum(d, D - 1)[None, :]
        x = widened(tl.load(k_ptr + at))
        wide = tl.where(ok, x, 0.0).to(tl.float64)
        total += wide
        squares += wide * wide
        # rows and channels too many are copies
        least = tl.minimum(least, x)
        most = tl.maximum(most, x)
    to = part_ptr + pid.to(tl.int64) * D + d
    step = L.to(tl.int64) * runs * D
    tl.store(to, tl.sum(total, axis=0), mask=d < D)
    tl.store(to + step, tl.sum(squares, axis=0), mask=d < D)
    tl.store(to + 2 * step, tl.min(least, axis=0).to(tl.float64), mask=d < D)
    tl.store(to + 3 * step, tl.max(most, axis=0).to(tl.float64), mask=d < D)


@triton.jit(do_not_specialize=NUMBERS)
def steps_kernel(
    part_ptr, mean_ptr, step_ptr, N, L, runs, step, rest, D: tl.constexpr
):  # fmt: skip
    """One head's means and its step, from the statistics of its runs."""
    head = tl.program_id(0)
    d = tl.arange(0, triton.next_power_of_2(D))
    total = tl.zeros(d.shape, tl.float64)
    squares = tl.zeros(d.shape, tl.float64)
    least = tl.full(d.shape, float("inf"), tl.float64)
    most = tl.full(d.shape, -float("inf"), tl.float64)
    side = L.to(tl.int64) * runs * D
    for run in range(runs):
        at = part_ptr + (head.to(tl.int64) * runs + run) * D + d
        total += tl.load(at, mask=d < D, other=0)
        squares += tl.load(at + side, mask=d < D, other=0)
        least = tl.minimum(least, tl.load(at + 2 * side, mask=d < D, other=0))
        most = tl.maximum(most, tl.load(at + 3 * side, mask=d < D, other=0))
    mean = (total / N).to(tl.float32).to(tl.float16)
    wide = mean.to(tl.float64)
    centred = squares - 2 * wide * total + N * wide * wide
    centred = tl.where((d >= D) | (centred < 0), 0.0, centred)
    rms = tl.sqrt(tl.sum(centred, axis=0) / D / N)
    m = mean.to(tl.float32)
    apart = tl.maximum(most.to(tl.float32) - m, m - least.to(tl.float32))
    apart = tl.max(tl.where(d < D, apart, 0.0), axis=0)
    wanted = (rms * step + rms * rest).to(tl.float32)
    found = step_of(wanted, apart, rms != rms)
    tl.store(mean_ptr + head * D + d, mean, mask=d < D)
    tl.store(step_ptr + head, found.to(tl.float16))


@triton.jit
def step_of(wanted, most, lost):
    """fp32 of an fp16 step, at least as wide as wanted and wide enough for the largest code."""
    wide = tl.maximum(wanted, tl.div_rn(most, most * 0 + MOST))
    wide = tl.where(lost, float("nan"), wide)
    step = -fp16_below(-wide).to(tl.float32)
    return tl.where(step < LEAST_STEP, LEAST_STEP, step)


@triton.jit(do_not_specialize=NUMBERS)
def keys_kernel(
    k_ptr, mean_ptr, step_ptr, codes_ptr, N, tiles, k_head, k_row,
    D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """int8 codes of a tile of keys."""
    head, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    d, n = channels(D), tile * ROWS + tl.arange(0, ROWS)
    at = head.to(tl.int64) * k_head + tl.minimum(n, N - 1).to(tl.int64)[:, None] * k_row
    mean = tl.load(mean_ptr + head * D + d).to(tl.float32)
    step = tl.zeros([ROWS], tl.float32) + tl.load(step_ptr + head).to(tl.float32)
    x = widened(tl.load(k_ptr + at + d[None, :])) - mean[None, :]
    _store_codes(codes_ptr, head, n, x, step, N, D)


@triton.jit(do_not_specialize=NUMBERS)
def values_kernel(
    v_ptr, step_ptr, codes_ptr, N, tiles, step, rest, v_head, v_row,
    D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """int8 codes of a tile of values, and a step for each token."""
    head, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    d, n = channels(D), tile * ROWS + tl.arange(0, ROWS)
    at = head.to(tl.int64) * v_head + tl.minimum(n, N - 1).to(tl.int64)[:, None] * v_row
    x = widened(tl.load(v_ptr + at + d[None, :]))
    wide = x.to(tl.float64)
    if triton.next_power_of_2(D) > D:  # copies of the last channel
        wide = tl.where((tl.arange(0, triton.next_power_of_2(D)) < D)[None, :], wide, 0.0)
    rms = tl.sqrt(tl.sum(wide * wide, axis=1) / D)
    wanted = (rms * step + rms * rest).to(tl.float32)
    found = step_of(wanted, tl.max(tl.abs(x), axis=1), rms != rms)
    tl.store(step_ptr + head.to(tl.int64) * N + n, found.to(tl.float16), mask=n < N)
    _store_codes(codes_ptr, head, n, x, found, N, D)


@triton.jit
def _store_codes(codes_ptr, head, n, x, step, N, D: tl.constexpr):
    """Codes of the tokens ``n`` of a head; ``step`` is one a token."""
    y = quotient(x, step[:, None], inverse_of(step)[:, None])
    y = tl.minimum(tl.maximum(y, -MOST), MOST) + ROUND
    codes = (y.to(tl.int32, bitcast=True) & 255).to(tl.int8)
    ok = (n < N)[:, None]
    if triton.next_power_of_2(D) > D:
        ok &= (tl.arange(0, triton.next_power_of_2(D)) < D)[None, :]
    to = codes_ptr + (head.to(tl.int64) * N + n)[:, None] * D + channels(D)[None, :]
    tl.store(to, codes, mask=ok)


@triton.jit(do_not_specialize=NUMBERS)
def restore_kernel(
    mean_ptr, k_step_ptr, v_step_ptr, codes_ptr, to_ptr, broken_ptr, N, L, tiles, start,
    D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A tile of keys or of values from its codes."""
    pid = tl.program_id(0)
    p, tile = pid // tiles, pid % tiles
    d = tl.arange(0, triton.next_power_of_2(D))
    n = tile * ROWS + tl.arange(0, ROWS)
    ok = (n < N)[:, None] & (d < D)[None, :]
    at = codes_ptr + (p.to(tl.int64) * N + n)[:, None] * D + d[None, :]
    x = tl.load(at, mask=ok, other=0).to(tl.float32)
    if p < L:
        step = tl.zeros([ROWS], tl.float32) + tl.load(k_step_ptr + p).to(tl.float32)
        mean = tl.load(mean_ptr + p.to(tl.int64) * D + d, mask=d < D, other=0).to(tl.float32)
        x = x * step[:, None] + mean[None, :]
        sound = tl.min((tl.abs(mean) <= GREATEST_FP16).to(tl.int32), axis=0)
    else:
        step = tl.load(v_step_ptr + (p - L).to(tl.int64) * N + n, mask=n < N, other=1)
        step = step.to(tl.float32)
        x = x * step[:, None]
        sound = 1
    good = (step > 0) & (step <= GREATEST_FP16)
    if (sound == 0) | (tl.min(good.to(tl.int32), axis=0) == 0):
        tl.store(broken_ptr, 1)
    to = to_ptr + (p.to(tl.int64) * (start + N) + start + n)[:, None] * D + d[None, :]
    tl.store(to, narrowed(x, to_ptr.dtype.element_ty), mask=ok)
