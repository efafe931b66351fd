"""A request's KV in coded form, in one range of memory that decode reads at once.

    head    nonce 16 bytes, prompt tokens u64, bytes after the head u64, checksum of them u64
    table   bytes of each layer's data, u64
    data    by layer, in the plan's order: what the layer's codec makes of its kept tokens
    zeros   up to a multiple of 8 bytes

All integers are little-endian. A READ has no owner: behind the end of its lease a range may hold
another request's bytes, or be overwritten while it is read. The nonce tells the one, the checksum
the other. Both sides compute every bound from the plan and the prompt's length.

No vLLM here. Shapes: G KV heads, M kept tokens, D head width.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pdtrim.engines.checksum import checksum
from pdtrim.engines.pages import hole_of
from pdtrim.errors import WireError
from pdtrim.kv.codecs import CodecBase
from pdtrim.plan import PrunePlan

HEAD = struct.Struct("<16sQQQ")
NONCE_BYTES = 16
WORD = 8
ALIGN = 64  # of ranges, so that the head and the words can be viewed as integers


@dataclass(frozen=True, kw_only=True)
class Part:
    """One layer of a request.

    Attributes:
        layer: in the dense model.
        hole: pages ``[start, stop)`` of the prompt that do not travel.
        tokens: M, those that do.
        heads: G, those that decode keeps.
        most: bytes of the encoding; a bound for a codec of variable length.
    """

    layer: int
    codec: CodecBase
    hole: tuple[int, int]
    tokens: int
    heads: int
    most: int


@dataclass(frozen=True, kw_only=True)
class Form:
    """What the range of a prompt of a certain length must look like."""

    prompt_tokens: int
    width: int
    dtype: torch.dtype
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, plan: PrunePlan, dtype: torch.dtype, prompt_tokens: int, block_size: int) -> Form:
        """The form of a prompt, all tokens but the last of which are handed over."""
        width = plan.model.head_dim
        parts = []
        for layer in plan.sent_layers:
            rule, heads = plan.kv[layer], len(plan.kv_heads("decode", layer))
            start, stop = hole_of(rule, prompt_tokens, block_size)
            tokens = prompt_tokens - 1 - (stop - start) * block_size
            most = rule.codec.nbytes(heads, tokens, width, dtype)
            parts.append(
                Part(
                    layer=layer,
                    codec=rule.codec,
                    hole=(start, stop),
                    tokens=tokens,
                    heads=heads,
                    most=most,
                )
            )
        return cls(prompt_tokens=prompt_tokens, width=width, dtype=dtype, parts=tuple(parts))

    @property
    def start(self) -> int:
        """Where the data begin."""
        return HEAD.size + WORD * len(self.parts)

    @cached_property
    def most(self) -> int:
        """Bytes of the range; a bound if a codec's length varies."""
        return _words(self.start + sum(part.most for part in self.parts)) * WORD

    @cached_property
    def exact(self) -> bool:
        """Whether the bound is the length."""
        return not any(part.codec.variable for part in self.parts)

    def fits(self, nbytes: int) -> bool:
        """Whether a range of this form can have so many bytes."""
        if self.exact:
            return nbytes == self.most
        return self.start <= nbytes <= self.most and nbytes % WORD == 0

    def write(self, room: Tensor, nonce: bytes, layers: Iterable[tuple[Tensor, ...]]) -> int:
        """Encode keys and values ``[G, M, D]`` of each part into ``room``; bytes written."""
        at, sizes = self.start, []
        for part, (k_GMD, v_GMD) in zip(self.parts, layers, strict=True):
            data = part.codec.encode(k_GMD, v_GMD)
            assert data.numel() <= part.most
            room[at : at + data.numel()].copy_(data)
            sizes.append(data.numel())
            at += data.numel()
        end = _words(at) * WORD
        room[at:end].zero_()
        # pinned and not waited for: an engine goes on with the next step while this one runs
        opening = torch.empty(self.start, dtype=torch.uint8, pin_memory=room.is_cuda)
        head = HEAD.pack(nonce, self.prompt_tokens, end - HEAD.size, 0)
        opening[: HEAD.size] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        opening[HEAD.size :].view(torch.int64).copy_(torch.tensor(sizes, dtype=torch.int64))
        room[: self.start].copy_(opening, non_blocking=True)
        # on the device: prefill need not wait for its own encoding
        room[HEAD.size - WORD : HEAD.size].view(torch.int64).copy_(checksum(room[HEAD.size : end]))
        return end

    def read(self, staged: Tensor, nonce: bytes) -> Iterator[tuple[Part, Tensor, Tensor]]:
        """Each part with its keys and values ``[G, M, D]``.

        Raises:
            WireError: it is not what this request's prefill wrote. All is checked before the first
                part is decoded, but for what a codec's own bytes say.
        """
        sizes = self._sizes(staged, nonce)
        at = self.start
        for part, size in zip(self.parts, sizes, strict=True):
            piece = staged[at : at + size].clone()  # aligned for any dtype
            shape = (part.heads, part.tokens, self.width)
            yield part, *part.codec.decode(piece, *shape, self.dtype)
            at += size

    def _sizes(self, staged: Tensor, nonce: bytes) -> list[int]:
        if staged.numel() < self.start:
            raise WireError(f"it holds {staged.numel()} bytes, which is less than its own head")
        found, tokens, rest, claimed = HEAD.unpack(_host(staged[: HEAD.size]))
        if found != nonce:
            raise WireError("it holds another request's KV: the lease had ended")
        if (tokens, rest) != (self.prompt_tokens, staged.numel() - HEAD.size):
            raise WireError(f"it holds {tokens} tokens in {rest} bytes, which were not announced")
        if int(checksum(staged[HEAD.size :])) % 2**64 != claimed:
            raise WireError("its bytes are not those that prefill wrote: overwritten, or changed")
        sizes = struct.unpack(f"<{len(self.parts)}Q", _host(staged[HEAD.size : self.start]))
        for part, size in zip(self.parts, sizes, strict=True):
            if size > part.most or (size != part.most and not part.codec.variable):
                raise WireError(f"layer {part.layer}: {size} bytes, {part.most} expected")
        if _words(self.start + sum(sizes)) * WORD != staged.numel():
            raise WireError("its layers do not add up to its length")
        return list(sizes)


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """Where a request's range lies in prefill's pool; the client carries it."""

    offset: int
    nbytes: int
    nonce: bytes

    def to_json(self) -> dict[str, Any]:
        """For ``kv_transfer_params``."""
        return {"offset": self.offset, "bytes": self.nbytes, "nonce": self.nonce.hex()}

    @classmethod
    def from_json(cls, value: Any, form: Form) -> Ticket:
        """Of a request of this form.

        Raises:
            WireError: it is not one.
        """
        value = value if isinstance(value, dict) else {}
        offset, nbytes, nonce = (value.get(key) for key in ("offset", "bytes", "nonce"))
        if type(offset) is not int or offset < 0 or offset % ALIGN or type(nbytes) is not int:
            raise WireError("its kv_transfer_params name no range of coded KV")
        if not form.fits(nbytes):
            raise WireError(
                f"its range has {nbytes} bytes: a prompt of {form.prompt_tokens} tokens has"
                f" {'' if form.exact else 'at most '}{form.most}"
            )
        try:
            raw = bytes.fromhex(nonce)
        except (TypeError, ValueError):
            raw = b""
        if len(raw) != NONCE_BYTES:
            raise WireError(f"its range has no nonce of {NONCE_BYTES} bytes")
        return cls(offset=offset, nbytes=nbytes, nonce=raw)


class Pool:
    """Who holds which range of a piece of memory."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._held: dict[str, tuple[int, int]] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._held

    def __len__(self) -> int:
        return len(self._held)

    def offset(self, key: str) -> int:
        """Where a holder's range begins."""
        return self._held[key][0]

    def reserve(self, key: str, nbytes: int) -> bool:
        """Hold the first gap that is large enough; False if there is none."""
        assert key not in self._held
        length, at = -(-nbytes // ALIGN) * ALIGN, 0
        for start, stop in sorted(self._held.values()):
            if start - at >= length:
                break
            at = stop
        if at + length > self.size:
            return False
        self._held[key] = at, at + length
        return True

    def release(self, key: str) -> None:
        """Let go; of nothing, if it holds nothing."""
        self._held.pop(key, None)


def pool_bytes(
    plan: PrunePlan, dtype: torch.dtype, longest: int, block_size: int, prompts: int
) -> int:
    """Memory for so many of the longest prompts.

    A ``first_last`` rule rounds to pages, so that a prompt a little shorter may need a little more.
    """
    lengths = range(max(1, longest - block_size + 1), longest + 1)
    most = max(Form.of(plan, dtype, tokens, block_size).most for tokens in lengths)
    return prompts * -(-most // ALIGN) * ALIGN


def _words(nbytes: int) -> int:
    return -(-nbytes // WORD)


def _host(data: Tensor) -> bytes:
    return data.cpu().numpy().tobytes()
