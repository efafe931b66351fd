"""Encoding of ``kv/codecs/integer.py`` on a GPU: each pair is read once, coded in registers.

One launch for all layers, one program a tile of a head. Tiles of keys are the groups of ``size``
tokens, by ``BT`` tokens at a time; tiles of values and of raw ends are ``BV`` tokens. A *unit* is
the fewest codes that fill whole bytes: 8 of 3 bits in 3 bytes, else ``8 / bits`` in one. A token's
codes follow one another and are whole units, so that a tile's are whole bytes, and those of a unit
lie in one thread's registers.

Shapes: L heads, N coded tokens, D head width, J groups.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pdtrim.kv.kernels.numbers import (
    channels,
    codes_of,
    grid_of,
    hadamard,
    layer_of,
    load_rows,
    ordered,
    widened,
)

SCALARS = [
    *("N", "tiles", "k_tiles", "v_tiles", "first", "last", "size", "heads", "room", "kept_layer"),
]
"""Numbers that change with a prompt's length: no kernel is compiled anew for a new one."""


@triton.jit(do_not_specialize=SCALARS, do_not_specialize_on_alignment=["kept_ptr"])
def encode_kernel(
    k_ptr, v_ptr, kept_ptr, apart_ptr, ends_ptr, k_grid_ptr, v_grid_ptr, k_codes_ptr, v_codes_ptr,
    N, tiles, k_tiles, v_tiles, first, last, size, heads, room,
    k_head, k_row, v_head, v_row, kept_head, kept_row, kept_layer,
    D: tl.constexpr, STAGES: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr,
    GROUP: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, CHUNKS: tl.constexpr,
    KEPT: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """A tile of keys, of values or of raw ends; ``tiles`` of them a head, in that order.

    ``first`` tokens before the coded ones are raw and ``last`` behind them. ``*_head``, ``*_row``
    and ``*_layer`` are strides, ``room`` that of layers' bytes in words of 16. ``STAGES`` is log2 D
    with a rotation, else 0.
    """
    pid = tl.program_id(0)
    head, tile = pid // tiles % heads, pid % tiles
    layer, layers = pid // tiles // heads, tl.num_programs(0) // tiles // heads
    k_ptr, v_ptr, kept_ptr = layer_of(
        k_ptr, v_ptr, kept_ptr, apart_ptr, layer, layers, kept_layer, KEPT, MANY
    )
    ends_ptr, k_grid_ptr, v_grid_ptr, k_codes_ptr, v_codes_ptr = data_of(
        ends_ptr, k_grid_ptr, v_grid_ptr, k_codes_ptr, v_codes_ptr, layer.to(tl.int64) * room
    )
    if tile < k_tiles:
        _keys(
            k_ptr, kept_ptr, k_grid_ptr, k_codes_ptr, heads, head, tile, N, k_tiles, first, size,
            k_head, k_row, kept_head, kept_row, D, STAGES, K_BITS, BT, CHUNKS, KEPT,
        )  # fmt: skip
    elif tile < k_tiles + v_tiles:
        _values(
            v_ptr, kept_ptr, v_grid_ptr, v_codes_ptr, heads, head, tile - k_tiles, N, first,
            v_head, v_row, kept_head, kept_row, D, STAGES, V_BITS, GROUP, BV, KEPT,
        )  # fmt: skip
    else:
        r = (tile - k_tiles - v_tiles) * BV + tl.arange(0, BV)
        ends = first + last
        n = tl.minimum(tl.where(r < first, r, r + N), N + ends - 1)
        d = channels(D)
        to = ends_ptr + (head.to(tl.int64) * ends + r)[:, None] * D + d[None, :]
        ok = (r < ends)[:, None]
        k = load_rows(k_ptr, kept_ptr, head, n, k_head, k_row, kept_head, kept_row, D, KEPT)
        tl.store(to, k, mask=ok)
        v = load_rows(v_ptr, kept_ptr, head, n, v_head, v_row, kept_head, kept_row, D, KEPT)
        tl.store(to + heads.to(tl.int64) * ends * D, v, mask=ok)


@triton.jit
def data_of(ends_ptr, k_grid_ptr, v_grid_ptr, k_codes_ptr, v_codes_ptr, words):
    """The parts of a layer's bytes, so many words of 16 after the first layer's."""
    ends_ptr += words * (128 // ends_ptr.dtype.element_ty.primitive_bitwidth)
    grid, codes = words * 8, words * 16
    return ends_ptr, k_grid_ptr + grid, v_grid_ptr + grid, k_codes_ptr + codes, v_codes_ptr + codes


@triton.jit
def _keys(
    k_ptr, kept_ptr, grid_ptr, codes_ptr, heads, head, j, N, J, first, size,
    k_head, k_row, kept_head, kept_row,
    D: tl.constexpr, STAGES: tl.constexpr, BITS: tl.constexpr, BT: tl.constexpr,
    CHUNKS: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Group ``j`` of every channel."""
    token = tl.arange(0, BT)
    count = tl.minimum(size, N - j * size)
    start = first + j * size
    # copies of the last token fill a short group: they move neither its least nor its most
    x = _turned(k_ptr, kept_ptr, head, start + tl.minimum(token, count - 1), k_head, k_row,
                kept_head, kept_row, D, STAGES, BT, KEPT)  # fmt: skip
    order = ordered(x)
    least, most = tl.min(order, axis=0), tl.max(order, axis=0)
    for chunk in range(1, CHUNKS):
        n = start + tl.minimum(chunk * BT + token, count - 1)
        x = _turned(k_ptr, kept_ptr, head, n, k_head, k_row, kept_head, kept_row, D, STAGES, BT,
                    KEPT)  # fmt: skip
        order = ordered(x)
        least = tl.minimum(least, tl.min(order, axis=0))
        most = tl.maximum(most, tl.max(order, axis=0))
    lo, scale, inverse = grid_of(least, most, BITS)
    d = channels(D)
    to = grid_ptr + head.to(tl.int64) * D * J + (d * J + j)
    tl.store(to, lo.to(tl.float16))
    tl.store(to + heads.to(tl.int64) * D * J, scale.to(tl.float16))
    codes_ptr += head.to(tl.int64) * bytes_of(D, BITS) * N
    for chunk in range(CHUNKS):
        if CHUNKS > 1:
            n = start + tl.minimum(chunk * BT + token, count - 1)
            x = _turned(k_ptr, kept_ptr, head, n, k_head, k_row, kept_head, kept_row, D, STAGES,
                        BT, KEPT)  # fmt: skip
        codes = codes_of(x, lo[None, :], scale[None, :], inverse[None, :], BITS)
        n = chunk * BT + token
        _store_codes(codes_ptr, j * size + n, codes, n < count, D, BITS, BT)


@triton.jit
def _values(
    v_ptr, kept_ptr, grid_ptr, codes_ptr, heads, head, tile, N, first,
    v_head, v_row, kept_head, kept_row,
    D: tl.constexpr, STAGES: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BV: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """All groups of ``BV`` tokens."""
    DP: tl.constexpr = triton.next_power_of_2(D)
    J: tl.constexpr = (D + GROUP - 1) // GROUP
    n = tile * BV + tl.arange(0, BV)
    x = _turned(v_ptr, kept_ptr, head, first + tl.minimum(n, N - 1), v_head, v_row, kept_head,
                kept_row, D, STAGES, BV, KEPT)  # fmt: skip
    order = ordered(x)
    grid_ptr += head.to(tl.int64) * N * J
    codes_ptr += head.to(tl.int64) * N * bytes_of(D, BITS)
    scales = heads.to(tl.int64) * N * J
    if GROUP & (GROUP - 1) == 0 and GROUP <= DP:
        JP: tl.constexpr = DP // GROUP
        order = tl.reshape(order, [BV, JP, GROUP])
        lo, scale, inverse = grid_of(tl.min(order, axis=2), tl.max(order, axis=2), BITS)
        j = tl.arange(0, JP)
        to = grid_ptr + n[:, None] * J + j[None, :]
        ok = (n < N)[:, None] & (j < J)[None, :] if J < JP else (n < N)[:, None]
        tl.store(to, lo.to(tl.float16), mask=ok)
        tl.store(to + scales, scale.to(tl.float16), mask=ok)
        x = tl.reshape(x, [BV, JP, GROUP])
        codes = codes_of(x, lo[:, :, None], scale[:, :, None], inverse[:, :, None], BITS)
    else:
        d = channels(D)
        codes = tl.zeros([BV, DP], tl.int32)
        for j in range(J):
            inside = (d // GROUP == j)[None, :]
            least = tl.min(tl.where(inside, order, 0x7FFFFFFF), axis=1)
            most = tl.max(tl.where(inside, order, -0x80000000), axis=1)
            lo, scale, inverse = grid_of(least, most, BITS)
            tl.store(grid_ptr + n * J + j, lo.to(tl.float16), mask=n < N)
            tl.store(grid_ptr + n * J + j + scales, scale.to(tl.float16), mask=n < N)
            new = codes_of(x, lo[:, None], scale[:, None], inverse[:, None], BITS)
            codes = tl.where(inside, new, codes)
    _store_codes(codes_ptr, n, tl.reshape(codes, [BV, DP]), n < N, D, BITS, BV)


@triton.jit
def _store_codes(
    codes_ptr, n, codes, ok, D: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Codes of the tokens ``n`` of a head, within which 32 bits say where; earlier bytes lower."""
    U: tl.constexpr = unit_of(BITS)
    Q: tl.constexpr = triton.next_power_of_2(D) // U
    shifts = tl.arange(0, U)[None, None, :] * BITS
    units = tl.sum(tl.reshape(codes, [ROWS, Q, U]) << shifts, axis=2)
    q = tl.arange(0, Q)
    at = n[:, None] * (D // U) + q[None, :]
    ok = ok[:, None] & (q < D // U)[None, :] if D // U < Q else ok[:, None]
    if BITS == 3:
        to = codes_ptr + at * 3
        tl.store(to, units.to(tl.uint8), mask=ok)
        tl.store(to + 1, (units >> 8).to(tl.uint8), mask=ok)
        tl.store(to + 2, (units >> 16).to(tl.uint8), mask=ok)
    else:
        tl.store(codes_ptr + at, units.to(tl.uint8), mask=ok)


@triton.jit
def _turned(
    x_ptr, kept_ptr, head, n, x_head, x_row, kept_head, kept_row,
    D: tl.constexpr, STAGES: tl.constexpr, ROWS: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """fp32 pairs, rotated where there are stages."""
    x = load_rows(x_ptr, kept_ptr, head, n, x_head, x_row, kept_head, kept_row, D, KEPT)
    x = widened(x)
    return hadamard(x, ROWS, D, STAGES) if STAGES else x


@triton.constexpr_function
def unit_of(bits):
    """The fewest codes that fill whole bytes."""
    return 8 if bits == 3 else 8 // bits


@triton.constexpr_function
def bytes_of(codes, bits):
    """Bytes of a number of codes that is a whole number of octets."""
    return codes // 8 * bits
