"""Frames over a socket: send one, read one, answer. The format is that of ``kv/frame.py``.

Answer to a frame: u8 status (0 taken, 1 refused), u16 length, UTF-8 reason.
"""

from __future__ import annotations

import hashlib
import socket
import struct
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
    check_opening,
    check_table,
    data_bytes_of,
    decode_groups,
    encode_frame,
    parse_opening,
    unpack_mask,
)

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

ANSWER = struct.Struct("<BH")


def send_frame(
    link: socket.socket, layout: Layout, request: bytes, layers: dict[int, SentLayer]
) -> int:
    """Send one request's KV; returns the bytes written to the socket."""
    sent = 0
    for piece in encode_frame(layout, request, layers):
        link.sendall(piece.numpy().data)
        sent += piece.numel()
    return sent


class FrameReader:
    """Reads one frame.

    Attributes:
        count: bytes read from the socket so far.
    """

    def __init__(self, link: socket.socket) -> None:
        self.count = 0
        self._link = link
        self._hash = hashlib.new(HASH)

    def opening(self) -> Opening | None:
        """Read the fixed part; None if the peer closed the connection between frames.

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
        self.count += got
        return parse_opening(bytes(raw))

    def body(self, opening: Opening, layout: Layout) -> dict[int, SentLayer]:
        """Read what follows an opening that must match ``layout``.

        Raises:
            WireError: anything differs from the layout or from the hash, or the frame is
                truncated. Nothing is allocated before its length has been checked, and nothing is
                decoded before the hash has.
        """
        check_opening(opening, layout)
        table = bytearray(ENTRY.size * len(layout.entries))
        self._read(table)
        sizes = check_table(bytes(table), opening, layout)
        raw = [
            self._layer(entry, data_bytes, layout)
            for entry, data_bytes in zip(layout.entries, sizes, strict=True)
        ]
        wanted, found = self._hash.digest(), bytearray(HASH_BYTES)
        self._read(found)
        if found != wanted:
            raise WireError("the frame's hash does not fit its bytes: they changed on the way")
        layers = {}
        for entry in layout.entries:
            keep_GN, data = raw.pop(0)  # its bytes are freed as soon as they are decoded
            groups = decode_groups(entry, data, keep_GN, layout)
            layers[entry.layer] = SentLayer(keep_GN=keep_GN, groups=groups)
        return layers

    def _layer(self, entry: Entry, data_bytes: int, layout: Layout) -> tuple[Tensor, Tensor]:
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
        self.count += memoryview(buffer).nbytes


def send_answer(link: socket.socket, problem: str | None) -> None:
    """Tell the sender that its frame was taken (None), or why not."""
    text = (problem or "").encode()[:1000]
    link.sendall(ANSWER.pack(int(problem is not None), len(text)) + text)


def read_answer(link: socket.socket) -> None:
    """Wait for the receiver's word.

    Raises:
        WireError: the frame was refused, with the receiver's reason, or the connection ended.
    """
    raw = bytearray(ANSWER.size)
    _fill_all(link, raw)
    status, length = ANSWER.unpack(raw)
    text = bytearray(length)
    _fill_all(link, text)
    if status:
        raise WireError(f"decode refused the handover: {text.decode(errors='replace')}")


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
