"""The wire format of a handover, version 1: one frame a request.

    magic     8 bytes   b"PDTRIMKV"
    version   u16       1
    digest    32 bytes  of the plan; both sides must hold the same
    request   16 bytes  chosen at random by the session
    tokens    u32       prompt tokens handed over
    dtype     u8        index in DTYPES
    layers    u16       entries of the table that follows
    payload   u64       bytes after the table
    table     layers x (u16 layer, u32 kept tokens, u64 bytes)
    payload   a contiguous buffer a layer, in table order: K [G, M, D], then V [G, M, D]

All integers are little-endian. Every size is a function of the plan and the token count, so the
receiver computes the frame it must get and compares before it allocates anything; a length that a
peer claims is never trusted. Answer to a frame: u8 status (0 taken, 1 refused), u16 length, UTF-8
reason.

Shapes: G KV heads, M kept tokens, D head width.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from pdtrim.errors import WireError
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.plan import PrunePlan

MAGIC = b"PDTRIMKV"
VERSION = 1
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD = struct.Struct("<8sH32s16sIBHQ")
ENTRY = struct.Struct("<HIQ")
ANSWER = struct.Struct("<BH")
MAX_LAYERS = 4096

LayerKV = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a frame must look like for a plan, a dtype and a token count."""

    digest: bytes
    dtype: torch.dtype
    tokens: int
    num_kv_heads: int
    head_dim: int
    kept: tuple[tuple[int, int], ...]  # (layer, kept tokens), in wire order

    @classmethod
    def of(cls, plan: PrunePlan, dtype: torch.dtype, tokens: int) -> Layout:
        """The layout of a handover of ``tokens`` prompt tokens."""
        policy = HandoverPolicy.of(plan)
        return cls(
            digest=bytes.fromhex(plan.digest),
            dtype=dtype,
            tokens=tokens,
            num_kv_heads=plan.model.num_kv_heads,
            head_dim=plan.model.head_dim,
            kept=tuple((layer, policy.kept(layer, tokens)) for layer in plan.sent_layers),
        )

    def layer_bytes(self, kept: int) -> int:
        """Bytes of one layer's buffer."""
        return 2 * self.num_kv_heads * kept * self.head_dim * self.dtype.itemsize

    @property
    def payload_bytes(self) -> int:
        """Bytes of all layers' buffers."""
        return sum(self.layer_bytes(kept) for _, kept in self.kept)

    @property
    def table(self) -> bytes:
        """The layer table."""
        return b"".join(
            ENTRY.pack(layer, kept, self.layer_bytes(kept)) for layer, kept in self.kept
        )

    def head(self, request: bytes) -> bytes:
        """The fixed part and the table of a frame."""
        fixed = HEAD.pack(
            MAGIC,
            VERSION,
            self.digest,
            request,
            self.tokens,
            DTYPES.index(self.dtype),
            len(self.kept),
            self.payload_bytes,
        )
        return fixed + self.table

    @property
    def frame_bytes(self) -> int:
        """Bytes of the whole frame: what crosses the socket."""
        return HEAD.size + ENTRY.size * len(self.kept) + self.payload_bytes


@dataclass(frozen=True, kw_only=True)
class Opening:
    """The fixed part of a frame, checked for what can be checked without a plan."""

    digest: bytes
    request: bytes
    tokens: int
    dtype: torch.dtype
    layers: int
    payload_bytes: int


def send_frame(
    link: socket.socket, layout: Layout, request: bytes, layers: dict[int, LayerKV]
) -> int:
    """Send one request's KV; returns the bytes written to the socket.

    Args:
        layers: each layer's kept keys and values, ``[G, M, D]``.
    """
    head = layout.head(request)
    link.sendall(head)
    sent = len(head)
    for layer, kept in layout.kept:
        buffer = pack_layer(*layers[layer])
        assert buffer.numel() == layout.layer_bytes(kept), f"layer {layer} does not fit its layout"
        link.sendall(buffer.numpy().data)
        sent += buffer.numel()
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
    _, version, digest, request, tokens, dtype, layers, payload = HEAD.unpack(raw)
    if version != VERSION:
        raise WireError(f"wire version {version} is not supported: this side speaks {VERSION}")
    if dtype >= len(DTYPES):
        raise WireError(f"unknown dtype code {dtype}")
    if layers > MAX_LAYERS:
        raise WireError(f"{layers} layers claimed, more than {MAX_LAYERS}")
    return Opening(
        digest=digest,
        request=request,
        tokens=tokens,
        dtype=DTYPES[dtype],
        layers=layers,
        payload_bytes=payload,
    )


def read_body(
    link: socket.socket, opening: Opening, layout: Layout
) -> tuple[dict[int, LayerKV], int]:
    """Read what follows an opening that must match ``layout``; returns (layers, frame bytes).

    Raises:
        WireError: anything differs from the layout, or the frame is truncated. Nothing is
            allocated before every length has been checked.
    """
    if opening.digest != layout.digest:
        raise WireError(
            f"plan digest {opening.digest.hex()[:12]} does not match this side's"
            f" {layout.digest.hex()[:12]}: export both stages from one plan"
        )
    if opening.tokens != layout.tokens:
        raise WireError(f"{opening.tokens} tokens sent, {layout.tokens} expected")
    if opening.dtype != layout.dtype:
        raise WireError(f"dtype {opening.dtype} sent, {layout.dtype} expected")
    if opening.layers != len(layout.kept) or opening.payload_bytes != layout.payload_bytes:
        raise WireError(
            f"{opening.layers} layers with {opening.payload_bytes} bytes sent,"
            f" {len(layout.kept)} layers with {layout.payload_bytes} bytes expected"
        )
    table = bytearray(len(layout.table))
    _fill_all(link, table)
    if bytes(table) != layout.table:
        raise WireError("the frame's layer table differs from the plan's")
    layers = {}
    for layer, kept in layout.kept:
        buffer = torch.empty(layout.layer_bytes(kept), dtype=torch.uint8)
        _fill_all(link, buffer.numpy())
        shape = (2, layout.num_kv_heads, kept, layout.head_dim)
        k_GMD, v_GMD = buffer.view(layout.dtype).view(shape)
        layers[layer] = k_GMD, v_GMD
    return layers, layout.frame_bytes


def pack_layer(k_GMD: Tensor, v_GMD: Tensor) -> Tensor:
    """One contiguous CPU byte buffer: K, then V."""
    both = torch.stack((k_GMD, v_GMD)).cpu().contiguous()
    return both.view(-1).view(torch.uint8)


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
