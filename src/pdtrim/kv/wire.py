"""Frames over a socket: write one, read one, answer. The format is that of ``kv/frame.py``.

Answer to a frame: u8 status (0 taken, 1 refused), u16 length, UTF-8 reason.
"""

from __future__ import annotations

import hashlib
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
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


PART_TIMEOUT_S = 120.0


class Refused(WireError):
    """The receiver did not take a frame, and said why."""


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

    def part(self, pieces: Sequence[Tensor]) -> int:
        """Write what :func:`encode_part` gave, and its hash."""
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
        data: the codec's bytes, on the CPU.
        count: bytes that crossed the socket for it.
    """

    entry: Entry
    layout: Layout
    keep_GN: Tensor
    data: Tensor
    count: int

    def decode(self) -> SentLayer:
        """The pairs.

        Raises:
            WireError: the data are not what the codec makes.
        """
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

    def part(self, entry: Entry, layout: Layout) -> RawPart:
        """Read the next part, which must be of this layer.

        Prefill may compute for as long as it likes before it; once begun, it must not stop.

        Raises:
            WireError: anything differs from the layout or from the hash, or the part is truncated.
                Nothing is allocated before its length has been checked.
        """
        raw = bytearray(ENTRY.size)
        self._link.settimeout(None)
        self._read(raw)
        self._link.settimeout(PART_TIMEOUT_S)
        data_bytes = check_entry(bytes(raw), entry)
        keep_GN, data = self._payload(entry, data_bytes, layout)
        wanted, found = self._hash.digest(), bytearray(HASH_BYTES)
        self._read(found)
        if found != wanted:
            raise WireError("the frame's hash does not fit its bytes: they changed on the way")
        count = ENTRY.size + entry.mask_bytes + data_bytes + HASH_BYTES
        return RawPart(entry=entry, layout=layout, keep_GN=keep_GN, data=data, count=count)

    def _payload(self, entry: Entry, data_bytes: int, layout: Layout) -> tuple[Tensor, Tensor]:
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
        data = torch.empty(data_bytes, dtype=torch.uint8)
        self._read(data.numpy().data)
        return keep_GN, data

    def _read(self, buffer: Buffer) -> None:
        """Fill a buffer, and add it to the hash."""
        _fill_all(self._link, buffer)
        self._hash.update(buffer)


def send_answer(link: socket.socket, problem: str | None) -> None:
    """Tell the sender that its frame was taken (None), or why not."""
    text = (problem or "").encode()[:1000]
    link.sendall(ANSWER.pack(int(problem is not None), len(text)) + text)


def read_answer(link: socket.socket) -> None:
    """Wait for the receiver's word.

    Raises:
        Refused: the frame was, with the receiver's reason.
        WireError: the connection ended.
    """
    raw = bytearray(ANSWER.size)
    _fill_all(link, raw)
    status, length = ANSWER.unpack(raw)
    text = bytearray(length)
    _fill_all(link, text)
    if status:
        raise Refused(f"decode refused the handover: {text.decode(errors='replace')}")


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
