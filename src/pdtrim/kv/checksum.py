"""A checksum of memory where it lies, the same on every device.

Each word of 8 bytes is added to a multiple of its number, goes through SplitMix64's finaliser
(Steele et al. 2014, with Stafford's constants), and all are summed; overflow wraps. The finaliser
is a bijection of 64 bits, so a change within one word, whichever bits it is, always changes the
sum. Any other change, words in another order among them, keeps it by a chance of 1 in 2^64. It is
no signature: whoever can write the memory can write the sum.

Shapes: W words, C words of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdtrim.kv.kernels import uses_kernels

GAMMA = 0x9E3779B97F4A7C15
ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
CHUNK_HOST = 1 << 16  # words whose scratch stays in a core's cache
CHUNK_DEVICE = 1 << 20  # words that are worth the start of a kernel


def checksum(data: Tensor) -> Tensor:
    """int64 of whole words, given as bytes: by a kernel on a GPU, else by :func:`in_chunks`."""
    words_W = data.view(torch.int64)
    if uses_kernels(data.device):
        from pdtrim.kv.kernels.checksum import checksum as by_kernel

        return by_kernel(words_W, GAMMA, *(factor for _, factor in ROUNDS[:2]))
    return in_chunks(words_W)


def in_chunks(words_W: Tensor) -> Tensor:
    """The same by torch; scratch is two chunks, whatever the size."""
    count = words_W.numel()
    chunk = min(count, CHUNK_DEVICE if words_W.is_cuda else CHUNK_HOST)
    steps_C = torch.arange(1, chunk + 1, device=words_W.device).mul_(_signed(GAMMA))
    mixed_C, shifted_C = torch.empty_like(steps_C), torch.empty_like(steps_C)
    total = torch.zeros((), dtype=torch.int64, device=words_W.device)
    for start in range(0, count, chunk or 1):
        size = min(chunk, count - start)
        mixed, shifted = mixed_C[:size], shifted_C[:size]
        torch.add(words_W[start : start + size], steps_C[:size], out=mixed)
        mixed.add_(_signed(start * GAMMA))
        for shift, factor in ROUNDS:
            torch.bitwise_right_shift(mixed, shift, out=shifted)
            shifted.bitwise_and_((1 << 64 - shift) - 1)  # torch shifts the sign in
            mixed.bitwise_xor_(shifted)
            if factor != 1:
                mixed.mul_(_signed(factor))
        total += mixed.sum()
    return total


def _signed(value: int) -> int:
    """The int64 of the same 64 bits."""
    value %= 1 << 64
    return value - (1 << 64) if value >> 63 else value
