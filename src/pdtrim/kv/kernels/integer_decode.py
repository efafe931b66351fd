"""Decoding of ``kv/codecs/integer.py`` on a GPU: the bytes to a cache's pairs in one launch.

One program a tile of a head, as in encoding; a tile of keys is ``BT`` tokens of one group.

Shapes: N coded tokens, D head width, J groups.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pdtrim.kv.kernels.integer_encode import SCALARS, bytes_of, data_of, unit_of
from pdtrim.kv.kernels.numbers import broken, channels, hadamard, layer_of, store_rows


@triton.jit(
    do_not_specialize=[*SCALARS, "J"],
    do_not_specialize_on_alignment=["ends_ptr", "k_grid_ptr", "v_grid_ptr", "k_codes_ptr",
                                    "kept_ptr"],
)  # fmt: skip
def decode_kernel(
    ends_ptr, k_grid_ptr, v_grid_ptr, k_codes_ptr, v_codes_ptr,
    k_ptr, v_ptr, kept_ptr, apart_ptr, broken_ptr,
    N, tiles, k_tiles, v_tiles, first, last, size, heads, room, J,
    k_head, k_row, v_head, v_row, kept_head, kept_row, kept_layer,
    D: tl.constexpr, STAGES: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr,
    GROUP: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, KEPT: tl.constexpr,
    MANY: tl.constexpr,
):  # fmt: skip
    """A tile of keys, of values or of raw ends; ``tiles`` of them a head, in that order.

    ``broken_ptr`` is set where a grid is none that an encoder makes. The rest is as in encoding.
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
            k_grid_ptr, k_codes_ptr, k_ptr, kept_ptr, broken_ptr, heads, head,
            tile // (k_tiles // J), tile % (k_tiles // J), N, J, first, size,
            k_head, k_row, kept_head, kept_row, D, STAGES, K_BITS, BT, KEPT,
        )  # fmt: skip
    elif tile < k_tiles + v_tiles:
        _values(
            v_grid_ptr, v_codes_ptr, v_ptr, kept_ptr, broken_ptr, heads, head, tile - k_tiles, N,
            first, v_head, v_row, kept_head, kept_row, D, STAGES, V_BITS, GROUP, BV, KEPT,
        )  # fmt: skip
    else:
        r = (tile - k_tiles - v_tiles) * BV + tl.arange(0, BV)
        ends = first + last
        n, ok = tl.where(r < first, r, r + N), r < ends
        at = ends_ptr + (head.to(tl.int64) * ends + r)[:, None] * D + channels(D)[None, :]
        k = tl.load(at, mask=ok[:, None])
        store_rows(k_ptr, kept_ptr, head, n, k, ok, k_head, k_row, kept_head, kept_row, D, KEPT)
        v = tl.load(at + heads.to(tl.int64) * ends * D, mask=ok[:, None])
        store_rows(v_ptr, kept_ptr, head, n, v, ok, v_head, v_row, kept_head, kept_row, D, KEPT)


@triton.jit
def _keys(
    grid_ptr, codes_ptr, to_ptr, kept_ptr, broken_ptr, heads, head, j, chunk, N, J, first, size,
    to_head, to_row, kept_head, kept_row,
    D: tl.constexpr, STAGES: tl.constexpr, BITS: tl.constexpr, BT: tl.constexpr,
    KEPT: tl.constexpr,
):  # fmt: skip
    """``BT`` tokens of group ``j`` of every channel."""
    at = grid_ptr + head.to(tl.int64) * D * J + (channels(D) * J + j)
    lo = tl.load(at).to(tl.float32)
    scale = tl.load(at + heads.to(tl.int64) * D * J).to(tl.float32)
    _note(broken_ptr, broken(lo, scale))
    n = chunk * BT + tl.arange(0, BT)
    ok = n < tl.minimum(size, N - j * size)
    codes_ptr += head.to(tl.int64) * bytes_of(D, BITS) * N
    codes = _load_codes(codes_ptr, j * size + n, ok, D, BITS, BT)
    x = codes.to(tl.float32) * scale[None, :] + lo[None, :]
    if STAGES:
        x = hadamard(x, BT, D, STAGES)
    n += first + j * size
    store_rows(to_ptr, kept_ptr, head, n, x, ok, to_head, to_row, kept_head, kept_row, D, KEPT)


@triton.jit
def _values(
    grid_ptr, codes_ptr, to_ptr, kept_ptr, broken_ptr, heads, head, tile, N, first,
    to_head, to_row, kept_head, kept_row,
    D: tl.constexpr, STAGES: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BV: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """All groups of ``BV`` tokens."""
    J: tl.constexpr = (D + GROUP - 1) // GROUP
    DP: tl.constexpr = triton.next_power_of_2(D)
    n = tile * BV + tl.arange(0, BV)
    ok = (n < N)[:, None]
    grid_ptr += head.to(tl.int64) * N * J
    codes_ptr += head.to(tl.int64) * N * bytes_of(D, BITS)
    codes = _load_codes(codes_ptr, n, n < N, D, BITS, BV)
    d = channels(D)
    scales = heads.to(tl.int64) * N * J
    if GROUP & (GROUP - 1) == 0 and GROUP <= DP:
        JP: tl.constexpr = DP // GROUP
        at = grid_ptr + n[:, None] * J + channels(J)[None, :]
        lo = tl.load(at, mask=ok, other=0).to(tl.float32)
        scale = tl.load(at + scales, mask=ok, other=1).to(tl.float32)
        _note(broken_ptr, tl.reshape(broken(lo, scale), [BV * JP]))
        x = tl.reshape(codes, [BV, JP, GROUP]).to(tl.float32)
        x = tl.reshape(x * scale[:, :, None] + lo[:, :, None], [BV, DP])
    else:
        at = grid_ptr + n[:, None] * J + (d // GROUP)[None, :]
        lo = tl.load(at, mask=ok, other=0).to(tl.float32)
        scale = tl.load(at + scales, mask=ok, other=1).to(tl.float32)
        _note(broken_ptr, tl.reshape(broken(lo, scale), [BV * DP]))
        x = codes.to(tl.float32) * scale + lo
    if STAGES:
        x = hadamard(x, BV, D, STAGES)
    store_rows(
        to_ptr, kept_ptr, head, first + n, x, n < N, to_head, to_row, kept_head, kept_row, D, KEPT
    )


@triton.jit
def _note(broken_ptr, bad):
    """Say it if any grid is broken; all programs would write the same number."""
    if tl.max(bad, axis=0) > 0:
        tl.store(broken_ptr, 1)


@triton.jit
def _load_codes(
    codes_ptr, n, ok, D: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """int32 codes ``[rows, D's power of two]`` of the tokens ``n`` of a head."""
    U: tl.constexpr = unit_of(BITS)
    at = n[:, None] * (D // U) + channels(D // U)[None, :]
    ok = ok[:, None]
    if BITS == 3:
        to = codes_ptr + at * 3
        units = tl.load(to, mask=ok, other=0).to(tl.int32)
        units |= tl.load(to + 1, mask=ok, other=0).to(tl.int32) << 8
        units |= tl.load(to + 2, mask=ok, other=0).to(tl.int32) << 16
    else:
        units = tl.load(codes_ptr + at, mask=ok, other=0).to(tl.int32)
    shifts = tl.arange(0, U)[None, None, :] * BITS
    codes = (units[:, :, None] >> shifts) & ((1 << BITS) - 1)
    return tl.reshape(codes, [ROWS, triton.next_power_of_2(D)])
