"""Frames over a socket: send one, read one, answer. The format is that of ``kv/frame.py``.

Answer to a frame: u8 status (0 taken, 1 refused), u16 length, UTF-8 reason.
"""

from __future__ import annotations

import socket
import struct

import torch

from pdtrim.errors import WireError
from pdtrim.kv.frame import (
    ENTRY,
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


def read_opening(link: socket.socket) -> Opening | None:
    """Read a frame's fixed part; None if the peer closed the connection between frames.

    Raises:
        WireError: not a frame of this version, or truncated.
    """
    raw = bytearray(HEAD.size)
    got = _fill(link, memoryview(raw))
    if got == 0:
        return None
    if not bytes(raw[:got]).startswith(MAGIC[:got]):
        raise WireError("not a pdtrim KV frame: wrong magic")
    if got < HEAD.size:
        raise WireError(f"truncated frame: {got} of {HEAD.size} header bytes came")
    return parse_opening(bytes(raw))


def read_body(
    link: socket.socket, opening: Opening, layout: Layout
) -> tuple[dict[int, SentLayer], int]:
    """Read what follows an opening that must match ``layout``; returns (layers, frame bytes).

    Raises:
        WireError: anything differs from the layout, or the frame is truncated. Nothing is
            allocated before its length has been checked.
    """
    check_opening(opening, layout)
    table = bytearray(ENTRY.size * len(layout.entries))
    _fill_all(link, table)
    sizes = check_table(bytes(table), opening, layout)
    layers = {
        entry.layer: _read_layer(link, entry, data_bytes, layout)
        for entry, data_bytes in zip(layout.entries, sizes, strict=True)
    }
    return layers, HEAD.size + len(table) + opening.payload_bytes


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


def _read_layer(link: socket.socket, entry: Entry, data_bytes: int, layout: Layout) -> SentLayer:
    G, N = entry.num_heads, layout.tokens
    if entry.static_GN is None:
        mask = torch.empty(entry.mask_bytes, dtype=torch.uint8)
        _fill_all(link, mask.numpy())
        keep_GN = unpack_mask(mask, entry.mask_rows, N).expand(G, N)
    else:
        keep_GN = entry.static_GN
    most = data_bytes_of(entry.codec, keep_GN, layout.head_dim, layout.dtype)
    if data_bytes > most or (not entry.codec.variable and data_bytes != most):
        raise WireError(f"layer {entry.layer}: {data_bytes} bytes do not fit its mask")
    data = torch.empty(data_bytes, dtype=torch.uint8)
    _fill_all(link, data.numpy())
    return SentLayer(keep_GN=keep_GN, groups=decode_groups(entry, data, keep_GN, layout))


def _fill_all(link: socket.socket, buffer: object) -> None:
    view = memoryview(buffer)  # type: ignore[arg-type]
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
