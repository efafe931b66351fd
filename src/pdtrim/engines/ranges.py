"""A request's KV in coded form, in one range of memory that decode reads at once.

    head    nonce 16 bytes, prompt tokens u64, bytes after the head u64, checksum of them u64
    table   bytes of each layer's data, u64
    data    by layer: what the layer's codec makes of its kept tokens

Layers are in the plan's order, but for layers that are alike (of one codec, hole and number of
heads), which stand together. Zeros fill up the table and each layer's data to a multiple of 16
bytes above 0, so that one launch codes the layers that are alike, by wide words. All integers are
little-endian. A READ has no owner: behind the end of its lease a range may hold
another request's bytes, or be overwritten while it is read. The nonce tells the one, the checksum
the other. Both sides compute every bound from the plan and the prompt's length.

Ranks of a server in tensor parallel share a layer's KV heads equally, and codecs see each head by
itself. Each rank has a range of its own heads, all at one offset of equally large pools.

No vLLM here. Shapes: G KV heads, T tokens of a cache, M kept ones, D head width, Y layers that are
alike, S bytes from one to the next.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor

from pdtrim.engines.pages import hole_of
from pdtrim.errors import WireError
from pdtrim.kv.checksum import checksum
from pdtrim.kv.codecs import CodecBase
from pdtrim.kv.kernels import ALIGNED
from pdtrim.plan import PrunePlan

HEAD = struct.Struct("<16sQQQ")
NONCE_BYTES = 16
WORD = 8
ALIGN = 64  # of ranges

Batch = tuple[Sequence[tuple[Tensor, Tensor]], Tensor | None]
"""Keys and values ``[G, T, D]`` of alike layers, and which tokens travel ``[Y, G, M]``, or all."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One layer of a request.

    Attributes:
        layer: in the dense model.
        hole: pages ``[start, stop)`` of the prompt that do not travel.
        tokens: M, those that do.
        heads: G, those that decode keeps; of one rank.
        most: bytes of the encoding; a bound for a codec of variable length.
    """

    layer: int
    codec: CodecBase
    hole: tuple[int, int]
    tokens: int
    heads: int
    width: int
    dtype: torch.dtype
    most: int

    @property
    def kind(self) -> tuple[CodecBase, tuple[int, int], int]:
        """Equal in layers that are alike."""
        return self.codec, self.hole, self.heads

    def decode(self, data_S: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[G, M, D]`` of a row of :meth:`Form.read`."""
        data = data_S if self.codec.variable else data_S[: self.most]
        return self.codec.decode(data, self.heads, self.tokens, self.width, self.dtype)


@dataclass(frozen=True, kw_only=True)
class Form:
    """What the range of a prompt of a certain length must look like."""

    prompt_tokens: int
    parts: tuple[Part, ...]

    @classmethod
    def of(
        cls,
        plan: PrunePlan,
        dtype: torch.dtype,
        prompt_tokens: int,
        block_size: int,
        ranks: int = 1,
    ) -> Form:
        """The form of a prompt, all tokens but the last of which are handed over.

        Args:
            ranks: that share the KV heads; the form is of one of them.
        """
        width = plan.model.head_dim
        parts = []
        for layer in plan.sent_layers:
            rule, heads = plan.kv[layer], len(plan.kv_heads("decode", layer)) // ranks
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
                    width=width,
                    dtype=dtype,
                    most=most,
                )
            )
        kinds = list(dict.fromkeys(part.kind for part in parts))
        parts.sort(key=lambda part: kinds.index(part.kind))
        return cls(prompt_tokens=prompt_tokens, parts=tuple(parts))

    @cached_property
    def start(self) -> int:
        """Where the data begin."""
        return _filled(HEAD.size + WORD * len(self.parts))

    @cached_property
    def runs(self) -> tuple[tuple[Part, ...], ...]:
        """Parts that are alike, in their order."""
        return tuple(tuple(run) for _, run in groupby(self.parts, lambda part: part.kind))

    @cached_property
    def most(self) -> int:
        """Bytes of the range; a bound if a codec's length varies."""
        return self.start + sum(_filled(part.most) for part in self.parts)

    @cached_property
    def exact(self) -> bool:
        """Whether the bound is the length."""
        return not any(part.codec.variable for part in self.parts)

    def fits(self, nbytes: int) -> bool:
        """Whether a range of this form can have so many bytes."""
        if self.exact:
            return nbytes == self.most
        return self.start <= nbytes <= self.most and nbytes % ALIGNED == 0

    def write(self, room: Tensor, nonce: bytes, batches: Iterable[Batch]) -> int:
        """Encode all parts in their order into ``room``; bytes written.

        Args:
            batches: of one or more parts that are alike.
        """
        parts, at, sizes = iter(self.parts), self.start, []
        for kv, kept_YGM in batches:
            part, *_ = alike = list(islice(parts, len(kv)))
            assert len(alike) == len(kv) and all(one.kind == part.kind for one in alike)
            if part.codec.variable:
                made = _encode(part.codec, kv, kept_YGM, room[at:])
            else:
                made = [part.most] * len(kv)
                room_YS = room[at:][: len(kv) * _filled(part.most)].view(len(kv), -1)
                part.codec.encode_layers(kv, kept_YGM, room_YS)
                room_YS[:, part.most :].zero_()
            sizes += made
            at += sum(map(_filled, made))
        assert len(sizes) == len(self.parts)
        self._open(room[:at], nonce, sizes)
        return at

    def _open(self, room: Tensor, nonce: bytes, sizes: list[int]) -> None:
        """Write head and table."""
        # pinned and not waited for: an engine goes on with the next step while this one runs
        opening = torch.zeros(self.start, dtype=torch.uint8, pin_memory=room.is_cuda)
        head = HEAD.pack(nonce, self.prompt_tokens, room.numel() - HEAD.size, 0)
        table = struct.pack(f"<{len(sizes)}Q", *sizes)
        text = bytearray(head + table)
        opening[: len(text)] = torch.frombuffer(text, dtype=torch.uint8)
        room[: self.start].copy_(opening, non_blocking=True)
        # on the device: prefill need not wait for its own encoding
        room[HEAD.size - WORD : HEAD.size].view(torch.int64).copy_(checksum(room[HEAD.size :]))

    def read(self, staged: Tensor, nonce: bytes) -> Iterator[tuple[tuple[Part, ...], Tensor]]:
        """Parts that are alike and their data ``[Y, S]``; of a codec of variable length one part.

        The data are ``staged`` itself.

        Raises:
            WireError: it is not what this request's prefill wrote. All is checked before the first
                part, but for what a codec's own bytes say.
        """
        sizes, at = iter(self._sizes(staged, nonce)), self.start
        for run in self.runs:
            variable = run[0].codec.variable
            for parts in ((part,) for part in run) if variable else (run,):
                size, *_ = islice(sizes, len(parts))
                end = at + len(parts) * _filled(size)
                data_YS = staged[at:end].view(len(parts), -1)
                yield parts, data_YS[:, :size] if variable else data_YS
                at = end

    def _sizes(self, staged: Tensor, nonce: bytes) -> list[int]:
        if staged.numel() < self.start:
            raise WireError(f"it holds {staged.numel()} bytes, which is less than its own head")
        if staged.numel() % WORD:
            raise WireError(f"it holds {staged.numel()} bytes, which are no whole words")
        opening = staged[: HEAD.size + WORD * len(self.parts)]
        found, tokens, rest, claimed, summed, *sizes = _opening(opening, staged[HEAD.size :])
        if found != nonce:
            raise WireError("it holds another request's KV: the lease had ended")
        if (tokens, rest) != (self.prompt_tokens, staged.numel() - HEAD.size):
            raise WireError(f"it holds {tokens} tokens in {rest} bytes, which were not announced")
        if summed != claimed:
            raise WireError("its bytes are not those that prefill wrote: overwritten, or changed")
        for part, size in zip(self.parts, sizes, strict=True):
            if size > part.most or (size != part.most and not part.codec.variable):
                raise WireError(f"layer {part.layer}: {size} bytes, {part.most} expected")
        if self.start + sum(map(_filled, sizes)) != staged.numel():
            raise WireError("its layers do not add up to its length")
        return list(sizes)


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """Where a request's ranges lie in prefill's pools; the client carries it.

    Attributes:
        sizes: bytes of each rank's range.
    """

    offset: int
    sizes: tuple[int, ...]
    nonce: bytes

    def to_json(self) -> dict[str, Any]:
        """For ``kv_transfer_params``."""
        return {"offset": self.offset, "bytes": [*self.sizes], "nonce": self.nonce.hex()}

    @classmethod
    def from_json(cls, value: Any, form: Form, ranks: int = 1) -> Ticket:
        """Of a request of this form.

        Raises:
            WireError: it is not one.
        """
        value = value if isinstance(value, dict) else {}
        offset, sizes, nonce = (value.get(key) for key in ("offset", "bytes", "nonce"))
        are_sizes = isinstance(sizes, list) and all(type(size) is int for size in sizes)
        if type(offset) is not int or offset < 0 or offset % ALIGN or not are_sizes:
            raise WireError("its kv_transfer_params name no range of coded KV")
        if len(sizes) != ranks:
            raise WireError(f"it has ranges of {len(sizes)} ranks, not of {ranks}")
        for nbytes in sizes:
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
        return cls(offset=offset, sizes=tuple(sizes), nonce=raw)


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
    plan: PrunePlan,
    dtype: torch.dtype,
    longest: int,
    block_size: int,
    prompts: int,
    ranks: int = 1,
) -> int:
    """Memory for so many of the longest prompts.

    A ``first_last`` rule rounds to pages, so that a prompt a little shorter may need a little more.
    """
    lengths = range(max(1, longest - block_size + 1), longest + 1)
    most = max(Form.of(plan, dtype, tokens, block_size, ranks).most for tokens in lengths)
    return prompts * -(-most // ALIGN) * ALIGN


def _filled(nbytes: int) -> int:
    """Bytes that data take, at least one word: even no data lie at an aligned address."""
    return max(1, -(-nbytes // ALIGNED)) * ALIGNED


def _encode(
    codec: CodecBase,
    kv: Sequence[tuple[Tensor, Tensor]],
    kept_YGM: Tensor | None,
    room: Tensor,
) -> list[int]:
    """Encodings of any length one behind the other, and their bytes."""
    at, sizes = 0, []
    for layer, pair in enumerate(kv):
        data = codec.encode_kept(*pair, None if kept_YGM is None else kept_YGM[layer])
        size = data.numel()
        room[at : at + size].copy_(data)
        room[at + size : at + _filled(size)].zero_()
        sizes.append(size)
        at += _filled(size)
    return sizes


def _opening(head: Tensor, rest: Tensor) -> tuple[Any, ...]:
    """Head, checksum of the rest, and table, of bytes that lie on a GPU: waited for once."""
    words = torch.cat((head.view(torch.int64), checksum(rest).view(1))).cpu()
    found = words.numpy().tobytes()
    *table, summed = struct.unpack_from(f"<{len(words) - HEAD.size // WORD}Q", found, HEAD.size)
    return *HEAD.unpack_from(found), summed, *table
