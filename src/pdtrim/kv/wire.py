"""Frames over a socket: write one, read one, answer. The format is that of ``kv/frame.py``.

Answer to a frame: u8 status (0 taken, 1 refused), u16 length, UTF-8 reason. Where the data of parts
do not travel on the socket, a layer that was read out of prefill's memory has an answer too: status
2, length 0.
"""

from __future__ import annotations

import hashlib
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pdtrim.errors import WireError
from pdtrim.kv.frame import (
    ENTRY,
    HASH,
    HASH_BYTES,
    HEAD,
    MAGIC,
    Entry,
    Layout,
    Opening,
    SentLayer,
    as_bytes,
    check_entry,
    data_bytes_of,
    decode_groups,
    encode_head,
    parse_opening,
    unpack_mask,
)

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

ANSWER = struct.Struct("<BH")
TAKEN, REFUSED, READ = range(3)
POOL = struct.Struct("<QiI")
CHECKSUM = struct.Struct("<Q")
HOST = -1
MOST_METADATA = 1 << 20
PART_TIMEOUT_S = 120.0


class Refused(WireError):
    """The receiver did not take a frame, and said why."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Where the data of a frame's parts lie in prefill's memory.

    Attributes:
        device: number of a GPU, or ``HOST``.
        metadata: what a NIXL agent needs to read there.
    """

    address: int
    device: int
    metadata: bytes


class FrameWriter:
    """Writes one frame; its methods return the bytes written to the socket."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._hash = hashlib.new(HASH)

    def heads(self, layouts: Sequence[Layout], requests: Sequence[bytes]) -> list[int]:
        """Open the frame of a batch; returns the bytes of each request."""
        sizes = []
        for at, (layout, request) in enumerate(zip(layouts, requests, strict=True)):
            sizes.append(self._write(encode_head(layout, request, more=len(layouts) - at - 1)))
        return sizes

    def pool(self, pool: Pool) -> int:
        """Say, behind the heads, where the data of all parts will lie."""
        head = POOL.pack(pool.address, pool.device, len(pool.metadata))
        return self._write(head + pool.metadata)

    def part(self, pieces: Sequence[Tensor]) -> int:
        """Write what :func:`encode_part` gave, or :func:`notice`, and its hash."""
        size = sum(self._write(piece.numpy().data) for piece in pieces)
        return size + self._write(self._hash.digest())

    def _write(self, data: Buffer) -> int:
        self._hash.update(data)
        self._link.sendall(data)
        return memoryview(data).nbytes


@dataclass(frozen=True, kw_only=True)
class RawPart:
    """A layer of a request as it came; its hash fits.

    Attributes:
        data_bytes: of the codec's bytes, within what plan and mask allow.
        count: bytes that crossed for it, data included.
        data: the codec's bytes, on any device; None as long as they lie in prefill's memory.
        checksum: of those, in whole words; None where the hash is theirs too.
    """

    entry: Entry
    layout: Layout
    keep_GN: Tensor
    data_bytes: int
    count: int
    data: Tensor | None = None
    checksum: int | None = None

    def decode(self) -> SentLayer:
        """The pairs, on the data's device.

        Raises:
            WireError: the data are not what the codec makes.
        """
        assert self.data is not None
        groups = decode_groups(self.entry, self.data, self.keep_GN, self.layout)
        return SentLayer(keep_GN=self.keep_GN, groups=groups)


class FrameReader:
    """Reads one frame."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._hash = hashlib.new(HASH)

    def opening(self) -> Opening | None:
        """Read a head; None if the peer closed the connection between frames.

        Raises:
            WireError: not a frame of this version, or truncated.
        """
        raw = bytearray(HEAD.size)
        got = _fill(self._link, memoryview(raw))
        if got == 0:
            return None
        if not bytes(raw[:got]).startswith(MAGIC[:got]):
            raise WireError("not a pdtrim KV frame: wrong magic")
        if got < HEAD.size:
            raise WireError(f"truncated frame: {got} of {HEAD.size} header bytes came")
        self._hash.update(raw)
        return parse_opening(bytes(raw))

    def pool(self) -> tuple[Pool, int]:
        """Where the data of this frame's parts lie, and the bytes that said so.

        Raises:
            WireError: more bytes than NIXL needs for that, or truncated.
        """
        raw = bytearray(POOL.size)
        self._read(raw)
        address, device, length = POOL.unpack(raw)
        if length > MOST_METADATA:
            raise WireError(f"{length} bytes about prefill's memory, more than {MOST_METADATA}")
        metadata = bytearray(length)
        self._read(metadata)
        pool = Pool(address=address, device=device, metadata=bytes(metadata))
        return pool, POOL.size + length

    def part(self, entry: Entry, layout: Layout) -> RawPart:
        """Read the next part, which must be of this layer.

        Prefill may compute for as long as it likes before it; once begun, it must not stop.

        Raises:
            WireError: anything differs from the layout or from the hash, or the part is truncated.
                Nothing is allocated before its length has been checked.
        """
        part = self._described(entry, layout)
        data = torch.empty(part.data_bytes, dtype=torch.uint8)
        self._read(data.numpy().data)
        self._check_hash()
        return replace(part, data=data)

    def notice(self, entry: Entry, layout: Layout) -> RawPart:
        """The same of a part whose data are still in prefill's memory.

        Raises:
            WireError: as :meth:`part`.
        """
        part, raw = self._described(entry, layout), bytearray(CHECKSUM.size)
        self._read(raw)
        self._check_hash()
        crossed = part.count - part.data_bytes + in_words(part.data_bytes) + CHECKSUM.size
        return replace(part, count=crossed, checksum=CHECKSUM.unpack(raw)[0])

    def _check_hash(self) -> None:
        wanted, found = self._hash.digest(), bytearray(HASH_BYTES)
        self._read(found)
        if found != wanted:
            raise WireError("the frame's hash does not fit its bytes: they changed on the way")

    def _described(self, entry: Entry, layout: Layout) -> RawPart:
        """A part before its data."""
        raw = bytearray(ENTRY.size)
        self._link.settimeout(None)
        self._read(raw)
        self._link.settimeout(PART_TIMEOUT_S)
        data_bytes = check_entry(bytes(raw), entry)
        G, N = entry.num_heads, layout.tokens
        if entry.static_GN is None:
            mask = torch.empty(entry.mask_bytes, dtype=torch.uint8)
            self._read(mask.numpy().data)
            keep_GN = unpack_mask(mask, entry.mask_rows, N).expand(G, N)
        else:
            keep_GN = entry.static_GN
        most = data_bytes_of(entry.codec, keep_GN, layout.head_dim, layout.dtype)
        if data_bytes > most or (not entry.codec.variable and data_bytes != most):
            raise WireError(f"layer {entry.layer}: {data_bytes} bytes do not fit its mask")
        count = ENTRY.size + entry.mask_bytes + data_bytes + HASH_BYTES
        return RawPart(
            entry=entry, layout=layout, keep_GN=keep_GN, data_bytes=data_bytes, count=count
        )

    def _read(self, buffer: Buffer) -> None:
        """Fill a buffer, and add it to the hash."""
        _fill_all(self._link, buffer)
        self._hash.update(buffer)


def in_words(nbytes: int) -> int:
    """Bytes up to a whole number of words of 8 bytes, as which checksums take them."""
    return -(-nbytes // 8) * 8


def notice(described: Sequence[Tensor], checksum: int) -> list[Tensor]:
    """A part without its data, of what :func:`describe` gave and the data's checksum."""
    return [*described, as_bytes(CHECKSUM.pack(checksum % 2**64))]


def send_answer(link: socket.socket, problem: str | None) -> None:
    """Tell the sender that its frame was taken (None), or why not."""
    text = (problem or "").encode()[:1000]
    status = TAKEN if problem is None else REFUSED
    link.sendall(ANSWER.pack(status, len(text)) + text)


def send_read(link: socket.socket) -> None:
    """Tell the sender that a layer was read out of its memory."""
    link.sendall(ANSWER.pack(READ, 0))


def read_answer(link: socket.socket) -> None:
    """Wait for the receiver's word on the whole frame.

    Raises:
        Refused: the frame was, with the receiver's reason.
        WireError: the connection ended.
    """
    while _word(link) == READ:
        pass


def wait_for_read(link: socket.socket) -> None:
    """Wait until the receiver has read one more layer.

    Raises:
        Refused: the frame was, with the receiver's reason.
        WireError: the connection ended, or the receiver took what has not all been sent.
    """
    if _word(link) != READ:
        raise WireError("decode took a frame that has not ended")


def _word(link: socket.socket) -> int:
    """The status of the receiver's next word."""
    raw = bytearray(ANSWER.size)
    _fill_all(link, raw)
    status, length = ANSWER.unpack(raw)
    text = bytearray(length)
    _fill_all(link, text)
    if status not in (TAKEN, READ):
        raise Refused(f"decode refused the handover: {text.decode(errors='replace')}")
    return int(status)


def _fill_all(link: socket.socket, buffer: Buffer) -> None:
    view = memoryview(buffer)
    got = _fill(link, view)
    if got < view.nbytes:
        raise WireError(f"truncated frame: {got} of {view.nbytes} bytes came")


def _fill(link: socket.socket, view: memoryview) -> int:
    """Read until the view is full or the peer closes; returns the bytes read."""
    got = 0
    while got < view.nbytes:
        try:
            count = link.recv_into(view[got:])
        except TimeoutError as error:
            raise WireError(f"timed out after {got} of {view.nbytes} bytes") from error
        except ConnectionError:
            return got
        if count == 0:
            return got
        got += count
    return got
