"""Where coded layers lie in a stage's memory: both stages compute it, and no place ever travels.

A ring of slots, a layer in each: as the first is used again, its layer has been read. In a slot
every request of the batch has a place, as long as the plan lets its part of that layer become.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from pdtrim.kv.frame import Layout
from pdtrim.runtime.line import DEPTH

SLOTS = DEPTH + 2
"""Of a line of work one layer is before it, ``DEPTH`` wait in it and one is at work."""
ALIGN = 256  # bytes: what a GPU reads at best, and whole words of a checksum


@dataclass(frozen=True, kw_only=True)
class Slots:
    """The places of one batch.

    Attributes:
        starts: where each request's part begins in a layer's slot, a row for each layer.
        size: bytes of a slot.
    """

    starts: tuple[tuple[int, ...], ...]
    size: int

    @classmethod
    def of(cls, layouts: Sequence[Layout]) -> Slots:
        """Of the requests with these layouts."""
        starts, size = [], 0
        for parts in zip(*(layout.entries for layout in layouts), strict=True):
            lengths = [-(-part.data_bytes // ALIGN) * ALIGN for part in parts]
            *row, end = accumulate(lengths, initial=0)
            starts.append(tuple(row))
            size = max(size, end)
        return cls(starts=tuple(starts), size=size)

    @property
    def nbytes(self) -> int:
        """Bytes of the ring."""
        return SLOTS * self.size

    def start(self, at: int, row: int) -> int:
        """Where a request's part of the n-th layer that travels begins in the ring."""
        return at % SLOTS * self.size + self.starts[at][row]
