"""Arithmetic on tiles in registers, equal to torch's to the bit, in Triton and its interpreter.

Launch with ``EXACT``: a fused multiply-add rounds once where torch rounds twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

EXACT = {"enable_fp_fusion": False}
"""Launch options of every kernel."""

ROUND = tl.constexpr(1.5 * 2**23)
"""Added to a number below 2**22 in fp32, it leaves the number, rounded to even, in the low bits."""

LEAST_SCALE = tl.constexpr(2.0**-24)
GREATEST_FP16 = tl.constexpr(65504.0)


@triton.jit
def widened(x):
    """fp32 of any float; bf16 is the upper half of its bits."""
    if x.dtype == tl.bfloat16:
        wide = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """A float dtype of finite fp32, rounded to even; by integers for bf16, as the interpreter
    rounds wrongly there."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        narrow = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        narrow = x.to(dtype)
    return narrow


@triton.jit
def ordered(x):
    """int32 in the order of fp32 numbers, with NaN at both ends, so that it is never lost."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def number(order):
    """fp32 of what :func:`ordered` made."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def fp16_below(x):
    """The largest fp16 number that is not above ``x`` of fp32; -inf below fp16's range."""
    near = x.to(tl.float16)
    wide = near.to(tl.float32)
    bits = near.to(tl.int16, bitcast=True).to(tl.int32)
    down = tl.where(wide == 0, -0x7FFF, tl.where(wide > 0, bits - 1, bits + 1))
    return tl.where(wide > x, down.to(tl.int16).to(tl.float16, bitcast=True), near)


@triton.jit
def grid_of(least, most, BITS: tl.constexpr):
    """lo and scale as fp32 of their fp16, and 1 / scale, of groups' ordered extremes."""
    lo = fp16_below(number(least) + 0.0).to(tl.float32)
    span = number(most) - lo
    levels = tl.full(span.shape, (1 << BITS) - 1, tl.float32)
    scale = -fp16_below(tl.div_rn(-span, levels)).to(tl.float32)
    scale = tl.where(scale < LEAST_SCALE, LEAST_SCALE, scale)
    return lo, scale, inverse_of(scale)


@triton.jit
def quotient(d, scale, inverse):
    """``d / scale`` in fp32, to be rounded further to few bits, by the inverse of an fp16 scale.

    The remainder of ``y = d * inverse`` is exact, as ``scale`` has 11 bits, and so corrects ``y``
    to less than 2**-23 of fp32's last bit before it is rounded. A *tie* of the rounding to come
    times ``scale`` is exact in fp32, and so is ``d``: a quotient that is no tie is over half of
    the last bit away from one, and falls on the side where an exact division puts it.
    """
    y = d * inverse
    return tl.fma(tl.fma(-y, scale, d), inverse, y)


@triton.jit
def inverse_of(scale):
    """``1 / scale``, rounded once."""
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def codes_of(x, lo, scale, inverse, BITS: tl.constexpr):
    """int32 codes of fp32 on a grid, which are 0 at least and ``2**BITS - 1`` at most."""
    y = quotient(x - lo, scale, inverse) + ROUND
    return y.to(tl.int32, bitcast=True) & ((1 << BITS) - 1)


@triton.jit
def broken(lo, scale):
    """int32 1 where a grid is none that an encoder makes."""
    sound = (tl.abs(lo) <= GREATEST_FP16) & (scale > 0) & (scale <= GREATEST_FP16)
    return (sound == 0).to(tl.int32)


@triton.jit
def hadamard(x, ROWS: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr):
    """fp32 ``[ROWS, D] H``; the additions of ``kv/codecs/hadamard.py`` in their order.

    A channel gets its partner as the sum of both's bits (modulo 2**32) less its own: a shuffle
    between two threads, where moving the tile about would pass through shared memory.
    """
    upper = (tl.arange(0, 2) << 31)[None, None, :, None]  # the sign of right in left - right
    for stage in tl.static_range(STAGES):
        bits = x.to(tl.int32, bitcast=True)
        own = tl.reshape(bits, [ROWS, D >> (stage + 1), 2, 1 << stage])
        other = tl.sum(own, axis=2, keep_dims=True) - own
        x = other.to(tl.float32, bitcast=True) + (own ^ upper).to(tl.float32, bitcast=True)
        x = tl.reshape(x, [ROWS, D])
    return x * (D**-0.5)


@triton.jit
def load_rows(x_ptr, kept_ptr, head, n, x_head, x_row, kept_head, kept_row, D: tl.constexpr,
              KEPT: tl.constexpr):  # fmt: skip
    """A tile ``[rows, D's power of two]`` of pairs ``n`` of a head, straight from the cache.

    Copies of the last channel fill the width. ``x_*`` and ``kept_*`` are strides.
    """
    head = head.to(tl.int64)
    row = tl.load(kept_ptr + head * kept_head + n * kept_row) if KEPT else n
    d = channels(D)
    return tl.load(x_ptr + head * x_head + row.to(tl.int64)[:, None] * x_row + d[None, :])


@triton.jit
def load_side(
    k_ptr, v_ptr, kept_ptr, heads, side, n, k_head, k_row, v_head, v_row, kept_head, kept_row,
    D: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """The same of keys or of values: ``side`` counts the keys' heads, then the values'."""
    if side < heads:
        x = load_rows(k_ptr, kept_ptr, side, n, k_head, k_row, kept_head, kept_row, D, KEPT)
    else:
        head = side - heads
        x = load_rows(v_ptr, kept_ptr, head, n, v_head, v_row, kept_head, kept_row, D, KEPT)
    return x


@triton.jit
def store_rows(x_ptr, kept_ptr, head, n, x, ok, x_head, x_row, kept_head, kept_row,
               D: tl.constexpr, KEPT: tl.constexpr):  # fmt: skip
    """The way back: a tile of fp32, or of the cache's own dtype, to the pairs ``n`` that are ok."""
    DP: tl.constexpr = triton.next_power_of_2(D)
    head = head.to(tl.int64)
    row = tl.load(kept_ptr + head * kept_head + n * kept_row, mask=ok, other=0) if KEPT else n
    to = x_ptr + head * x_head + row.to(tl.int64)[:, None] * x_row + channels(D)[None, :]
    # channels too many may hold other numbers than the last one
    ok = ok[:, None] & (tl.arange(0, DP) < D)[None, :] if D < DP else ok[:, None]
    to_type: tl.constexpr = x_ptr.dtype.element_ty
    tl.store(to, x if x.dtype == to_type else narrowed(x, to_type), mask=ok)


@triton.jit
def store_side(
    k_ptr, v_ptr, kept_ptr, heads, side, n, x, ok, k_head, k_row, v_head, v_row,
    kept_head, kept_row, D: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """The same to keys or to values, as :func:`load_side` counts them."""
    if side < heads:
        store_rows(k_ptr, kept_ptr, side, n, x, ok, k_head, k_row, kept_head, kept_row, D, KEPT)
    else:
        head = side - heads
        store_rows(v_ptr, kept_ptr, head, n, x, ok, v_head, v_row, kept_head, kept_row, D, KEPT)


@triton.jit
def layer_of(k_ptr, v_ptr, kept_ptr, apart_ptr, layer, layers, kept_layer, KEPT: tl.constexpr,
             MANY: tl.constexpr):  # fmt: skip
    """Where a layer's keys, values and kept tokens are; ``apart_ptr`` is of ``launch.apart``."""
    if MANY:
        WORD: tl.constexpr = 128 // k_ptr.dtype.element_ty.primitive_bitwidth
        k_ptr += tl.load(apart_ptr + layer) * WORD
        v_ptr += tl.load(apart_ptr + layers + layer) * WORD
        if KEPT:
            kept_ptr += layer.to(tl.int64) * kept_layer
    return k_ptr, v_ptr, kept_ptr


@triton.jit
def channels(D: tl.constexpr):
    """Channel numbers to the next power of two; the last channel's in those too many."""
    d = tl.arange(0, triton.next_power_of_2(D))
    if triton.next_power_of_2(D) != D:
        d = tl.minimum(d, D - 1)
    return d
