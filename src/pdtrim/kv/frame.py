"""The wire format of a handover, version 4: one frame a batch of requests.

    head      of each request:
      magic     8 bytes   b"PDTRIMKV"
      version   u16       4
      digest    32 bytes  of the plan; both sides must hold the same
      request   16 bytes  chosen at random by the session
      tokens    u32       prompt tokens handed over
      dtype     u8        index in DTYPES
      layers    u16       parts of this request
      more      u16       heads that follow before the first part
    part      of each layer, in the plan's order, of each request, in the order of the heads:
      entry     u16 layer, u32 mask bytes, u64 data bytes
      payload   the mask, then the data
      hash      32 bytes  SHA-256 of all bytes of the frame before

A part needs nothing of later layers, so that it travels while prefill computes them, and is checked
and decoded while they are under way.

All integers are little-endian. The *mask* says which pairs travel, one bit each, lowest bit first,
a row of whole bytes for each KV head; one row if the selector keeps the same tokens of all heads;
absent if the plan and the token count already tell. The *data* are the codec's bytes, one piece for
each group of heads that keep equally many tokens, in the order of the group's first head; a codec
of variable length writes a u32 length before each piece.

The KV heads of a layer are those that decode has; what prefill makes beside them stays there.

The hash tells bytes that changed on the way, whichever bit it was; it is no signature. The plan
bounds every size, so the receiver checks each length before it allocates; a length that a peer
claims is never trusted. No part is decoded before its hash was compared.

Shapes: G KV heads, g heads of a group, N prompt tokens, M kept tokens, D head width.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from pdtrim.errors import WireError
from pdtrim.kv.codecs import CodecBase
from pdtrim.kv.groups import HeadGroup
from pdtrim.kv.policy import partition
from pdtrim.kv.selectors import StaticSelector
from pdtrim.plan import PrunePlan

MAGIC = b"PDTRIMKV"
VERSION = 4
HASH = "sha256"  # with the processors' own instructions faster than BLAKE2
HASH_BYTES = 32
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD = struct.Struct("<8sH32s16sIBHH")
ENTRY = struct.Struct("<HIQ")
LENGTH = struct.Struct("<I")
MAX_LAYERS = 4096


@dataclass(frozen=True, kw_only=True)
class SentLayer:
    """One request's pairs of one layer.

    Attributes:
        keep_GN: bool, which pairs these are, on the CPU once it has travelled.
        groups: of one row each, see :class:`HeadGroup`.
    """

    keep_GN: Tensor
    groups: list[HeadGroup]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a layer may take in a frame.

    Attributes:
        num_heads: KV heads that travel.
        static_GN: the pairs that travel, where plan and token count tell; else None.
        data_bytes: exact if ``exact``, else the most.
    """

    layer: int
    num_heads: int
    codec: CodecBase
    mask_rows: int
    mask_bytes: int
    static_GN: Tensor | None
    data_bytes: int

    @property
    def exact(self) -> bool:
        """Whether the size is known before the prompt is."""
        return self.static_GN is not None and not self.codec.variable


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a frame must look like for a plan, a dtype and a token count."""

    digest: bytes
    dtype: torch.dtype
    tokens: int
    head_dim: int
    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, plan: PrunePlan, dtype: torch.dtype, tokens: int) -> Layout:
        """The layout of a handover of ``tokens`` prompt tokens."""
        entries = tuple(_entry(plan, layer, tokens, dtype) for layer in plan.sent_layers)
        return cls(
            digest=bytes.fromhex(plan.digest),
            dtype=dtype,
            tokens=tokens,
            head_dim=plan.model.head_dim,
            entries=entries,
        )

    @property
    def exact(self) -> bool:
        """Whether the frame's size is known before the prompt is."""
        return all(entry.exact for entry in self.entries)

    @property
    def frame_bytes(self) -> int:
        """What crosses the socket for one request; the most, unless :attr:`exact`."""
        around = ENTRY.size + HASH_BYTES
        return HEAD.size + sum(e.mask_bytes + e.data_bytes + around for e in self.entries)


@dataclass(frozen=True, kw_only=True)
class Opening:
    """A request's head, checked for what can be checked without a plan."""

    digest: bytes
    request: bytes
    tokens: int
    dtype: torch.dtype
    layers: int
    more: int


def encode_head(layout: Layout, request: bytes, *, more: int) -> bytes:
    """A request's head; ``more`` heads follow it."""
    return HEAD.pack(
        MAGIC,
        VERSION,
        layout.digest,
        request,
        layout.tokens,
        DTYPES.index(layout.dtype),
        len(layout.entries),
        more,
    )


def encode_part(entry: Entry, sent: SentLayer) -> list[Tensor]:
    """A layer of a request as byte tensors on the CPU, without its hash.

    Bytes from a GPU are there once the current stream has been waited for.
    """
    pieces = [_host(piece) for piece in encode_data(entry, sent)]
    return [*describe(entry, sent, sum(piece.numel() for piece in pieces)), *pieces]


def encode_data(entry: Entry, sent: SentLayer) -> list[Tensor]:
    """The codec's bytes alone, where the pairs are; a length may be on the CPU."""
    pieces = []
    for group in sent.groups:
        data = entry.codec.encode(group.k_BgMD[0].contiguous(), group.v_BgMD[0].contiguous())
        if entry.codec.variable:
            pieces.append(as_bytes(LENGTH.pack(data.numel())))
        pieces.append(data)
    return pieces


def describe(entry: Entry, sent: SentLayer, data_bytes: int) -> list[Tensor]:
    """What goes before the data of a part: its entry and its mask, on the CPU."""
    mask = pack_mask(sent.keep_GN[: entry.mask_rows])
    assert mask.numel() == entry.mask_bytes and data_bytes <= entry.data_bytes
    return [as_bytes(ENTRY.pack(entry.layer, mask.numel(), data_bytes)), mask]


def parse_opening(raw: bytes) -> Opening:
    """Check a request's head for what can be checked without a plan.

    Raises:
        WireError: another version, or a dtype or layer count that no frame has.
    """
    _, version, digest, request, tokens, dtype, layers, more = HEAD.unpack(raw)
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
        more=more,
    )


def check_opening(opening: Opening, layout: Layout) -> None:
    """Raise WireError unless a request's head is what the layout demands."""
    if opening.digest != layout.digest:
        raise WireError(
            f"plan digest {opening.digest.hex()[:12]} does not match this side's"
            f" {layout.digest.hex()[:12]}: export both stages from one plan"
        )
    if opening.tokens != layout.tokens:
        raise WireError(f"{opening.tokens} tokens sent, {layout.tokens} expected")
    if opening.dtype != layout.dtype:
        raise WireError(f"dtype {opening.dtype} sent, {layout.dtype} expected")
    if opening.layers != len(layout.entries):
        raise WireError(f"{opening.layers} layers sent, {len(layout.entries)} expected")


def check_entry(raw: bytes, entry: Entry) -> int:
    """Data bytes of a part; WireError unless its entry is what the layout demands."""
    layer, mask_bytes, data_bytes = ENTRY.unpack(raw)
    if layer != entry.layer or mask_bytes != entry.mask_bytes:
        raise WireError(f"a part of layer {layer} came where the plan has one of {entry.layer}")
    most = entry.data_bytes
    if data_bytes > most or (entry.exact and data_bytes != most):
        bound = "" if entry.exact else "at most "
        raise WireError(f"layer {layer}: {data_bytes} bytes sent, {bound}{most} bytes expected")
    return int(data_bytes)


def decode_groups(entry: Entry, data: Tensor, keep_GN: Tensor, layout: Layout) -> list[HeadGroup]:
    """A layer's data back to pairs, where the data are; WireError if the pieces do not fit.

    Args:
        keep_GN: on the CPU.
    """
    groups, at = [], 0
    for heads, tokens in _groups(keep_GN):
        shape = (len(heads), tokens, layout.head_dim)
        size = entry.codec.nbytes(*shape, layout.dtype)
        if entry.codec.variable:
            if at + LENGTH.size > data.numel():
                raise WireError(f"layer {entry.layer}: a length field is missing")
            (size,) = LENGTH.unpack(data[at : at + LENGTH.size].cpu().numpy().tobytes())
            at += LENGTH.size
        if at + size > data.numel():
            raise WireError(f"layer {entry.layer}: a piece passes the layer's end")
        piece = data[at : at + size].clone()  # aligned for any dtype
        k_gMD, v_gMD = entry.codec.decode(piece, *shape, layout.dtype)
        at += size
        positions_gM = _positions(keep_GN, heads, tokens, data.device)
        k_BgMD, v_BgMD, positions_BgM = k_gMD[None], v_gMD[None], positions_gM[None]
        groups.append(
            HeadGroup(heads=heads, k_BgMD=k_BgMD, v_BgMD=v_BgMD, positions_BgM=positions_BgM)
        )
    if at != data.numel():
        raise WireError(f"layer {entry.layer}: {data.numel() - at} bytes are left over")
    return groups


def pack_mask(keep_GN: Tensor) -> Tensor:
    """Bits to bytes, ``[G * ceil(N / 8)]``, lowest bit first, each head padded with zeros."""
    G, N = keep_GN.shape
    bits = torch.nn.functional.pad(keep_GN.cpu().byte(), (0, -N % 8)).view(G, -(-N // 8), 8)
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.int32)
    return (bits.int() * weights).sum(-1).to(torch.uint8).flatten()


def unpack_mask(data: Tensor, heads: int, tokens: int) -> Tensor:
    """The inverse, bool ``[G, N]``.

    Raises:
        WireError: bits behind the last token are set.
    """
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8)
    bits = (data.view(heads, -1, 1) & weights).ne(0).flatten(1)
    if bool(bits[:, tokens:].any()):
        raise WireError("the frame's mask names tokens that do not exist")
    return bits[:, :tokens]


def _entry(plan: PrunePlan, layer: int, tokens: int, dtype: torch.dtype) -> Entry:
    rule, width = plan.kv[layer], plan.model.head_dim
    heads = len(plan.kv_heads("decode", layer))
    static_GN, mask_rows = None, rule.selector.mask_rows(heads)
    if isinstance(rule.selector, StaticSelector):
        static_GN = rule.selector.static_keep(heads, tokens, block_size=plan.block_size)
        data_bytes = data_bytes_of(rule.codec, static_GN, width, dtype)
    else:  # the most that any choice can take
        whole = torch.ones(heads, tokens, dtype=torch.bool)
        data_bytes = data_bytes_of(rule.codec, whole, width, dtype) + _slack(rule.codec, heads)
    return Entry(
        layer=layer,
        num_heads=heads,
        codec=rule.codec,
        mask_rows=mask_rows,
        mask_bytes=mask_rows * -(-tokens // 8),
        static_GN=static_GN,
        data_bytes=data_bytes,
    )


def _slack(codec: CodecBase, heads: int) -> int:
    """Length fields that more groups of heads would need."""
    return LENGTH.size * (heads - 1) if codec.variable else 0


def data_bytes_of(codec: CodecBase, keep_GN: Tensor, width: int, dtype: torch.dtype) -> int:
    """Bytes of a layer's data; the most, for a codec of variable length."""
    prefix = LENGTH.size if codec.variable else 0
    return sum(
        prefix + codec.nbytes(len(heads), tokens, width, dtype)
        for heads, tokens in _groups(keep_GN)
    )


def _groups(keep_GN: Tensor) -> list[tuple[tuple[int, ...], int]]:
    counts_G = keep_GN.sum(-1)
    return [(heads, int(counts_G[heads[0]])) for heads in partition(counts_G[None])]


def _positions(
    keep_GN: Tensor, heads: tuple[int, ...], tokens: int, device: torch.device
) -> Tensor:
    """Positions ``[g, M]`` of what some heads keep."""
    if tokens == keep_GN.shape[1]:  # all: nothing to look for, and nothing to copy
        return torch.arange(tokens, device=device).expand(len(heads), tokens)
    return keep_GN[list(heads)].nonzero()[:, 1].view(len(heads), tokens).to(device)


def _host(data: Tensor) -> Tensor:
    """The bytes on the CPU; from a GPU into pinned memory, without a wait."""
    if data.device.type == "cpu":
        return data
    pinned = torch.empty(data.shape, dtype=data.dtype, pin_memory=True)
    return pinned.copy_(data, non_blocking=True)


def as_bytes(data: bytes) -> Tensor:
    """Bytes as a tensor of their own."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
