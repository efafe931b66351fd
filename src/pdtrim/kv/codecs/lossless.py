"""Every bit kept, fewer bytes: the planes of the raw encoding, each under zstandard.

Plane i holds byte i of every element, little-endian. The last plane has the sign and most of the
exponent, which repeat a great deal; the others are mantissa, near noise, and travel as they are
when they do not shrink.

Papers: the exponent's low entropy is that of DFloat11 (arXiv 2504.11651) and SplitZip (2605.01708);
a general entropy coder over byte planes is the "byte grouping" of ZipNN (2411.05239). Different
from SplitZip: zstandard on the host in place of a code book on the GPU, so a GPU's tensors cross to
the host and back; worth it on slow links only.

Bytes: a u64 length for each plane, little-endian, then the planes. A length equal to the plane's
element count says that the plane is stored, so no plane grows and the bound is exact.

Shapes: L heads, M tokens, D head width, P planes, one a byte of the dtype.
"""

from __future__ import annotations

import math
import struct
from typing import ClassVar, Literal

import torch
import zstandard
from pydantic import Field
from torch import Tensor

from pdtrim.errors import WireError
from pdtrim.kv.codecs.base import CodecBase
from pdtrim.kv.codecs.raw import Raw

LENGTH_BYTES = 8


class Lossless(CodecBase):
    """Bit-exact keys and values at zstandard's ``level``."""

    name: Literal["lossless"] = "lossless"
    exact: ClassVar[bool] = True
    largest: ClassVar[float] = math.inf
    variable: ClassVar[bool] = True
    presets: ClassVar[str] = "lossless"
    level: int = Field(default=1, ge=1, le=3)

    def encode(self, k_LMD: Tensor, v_LMD: Tensor) -> Tensor:
        """See the base class."""
        raw = Raw().encode(k_LMD, v_LMD).cpu()
        compressor = zstandard.ZstdCompressor(level=self.level)
        packed: list[bytes] = []
        for column in raw.view(-1, k_LMD.dtype.itemsize).unbind(1):
            # one by one, because a CPU is slow at a transpose with so short a side
            stored = column.contiguous().numpy().tobytes()
            smaller = compressor.compress(stored)
            packed.append(smaller if len(smaller) < len(stored) else stored)
        head = struct.pack(f"<{len(packed)}Q", *map(len, packed))
        data = torch.frombuffer(bytearray(head + b"".join(packed)), dtype=torch.uint8)
        return data.to(k_LMD.device)

    def decode(
        self, data: Tensor, heads: int, tokens: int, width: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """See the base class."""
        elements, P = 2 * heads * tokens * width, dtype.itemsize
        coded, body = data.cpu().numpy().tobytes(), LENGTH_BYTES * P
        if len(coded) < body:
            raise WireError(f"lossless KV of {len(coded)} bytes is cut short")
        lengths = struct.unpack(f"<{P}Q", coded[:body])
        if max(lengths) > elements or body + sum(lengths) != len(coded):
            raise WireError(f"lossless KV of {len(coded)} bytes does not fit its lengths")
        raw = torch.empty(elements, P, dtype=torch.uint8)
        at = body
        for column, length in zip(raw.unbind(1), lengths, strict=True):
            if elements:
                stored = _expand(coded[at : at + length], elements)
                column.copy_(torch.frombuffer(bytearray(stored), dtype=torch.uint8))
            at += length
        return Raw().decode(raw.view(-1).to(data.device), heads, tokens, width, dtype)

    def nbytes(self, heads: int, tokens: int, width: int, dtype: torch.dtype) -> int:
        """See the base class."""
        return LENGTH_BYTES * dtype.itemsize + Raw().nbytes(heads, tokens, width, dtype)

    def round_trip(self, k_LMD: Tensor, v_LMD: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing changes, so nothing is copied."""
        return k_LMD, v_LMD


def _expand(coded: bytes, size: int) -> bytes:
    """One plane of ``size`` bytes, whatever the peer sent."""
    if len(coded) == size:
        return coded
    try:
        # the library allocates what the frame claims, so the claim is read before it does
        if zstandard.frame_content_size(coded) != size:
            raise WireError("lossless KV holds a plane that is not of its shape's size")
        # and it refuses a frame that breaks its claim
        return zstandard.ZstdDecompressor().decompress(coded, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise WireError(f"lossless KV cannot be expanded: {error}") from error
