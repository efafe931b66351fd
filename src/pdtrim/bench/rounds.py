"""All ways to hand a shape's cache over, timed in turn, and rows of what was timed.

Shapes: L layers; 2 for K and V, G KV heads, N prompt tokens, D head width; R rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pdtrim.bench.lanes import Lane, spread, timed
from pdtrim.bench.pipeline import Alone, Machines, Pipeline
from pdtrim.bench.traffic import LayerSent, paged

if TYPE_CHECKING:
    from pdtrim.bench.nixl_link import NixlLink

PAGE = 16  # tokens of a page of a serving engine
SLOW = 0.25
"""Of a plain copy: a NIXL link below it is not what the hardware can do."""


@dataclass(frozen=True, kw_only=True)
class _Blocking:
    """Seconds of one round, and of the same by NIXL."""

    copy: float
    nixl: float | None


@dataclass(frozen=True, kw_only=True)
class _Handed:
    """A policy in one round.

    Attributes:
        slower: prefill with encoding and moves beside it, over prefill alone, less 1.
        encoded_L: when each layer was encoded, from the end of prefill.
        exposed: with copies for moves, decoding included.
        nixl_L: seconds of each layer's move by NIXL.
    """

    alone: Alone
    slower: float
    encoded_L: list[float]
    exposed: float
    nixl_L: list[float] | None


class Rounds:
    """What is timed in a round, and what was kept of each.

    Args:
        sent: policies by name.
        nixl: what measured links move by; None is a copy.
    """

    def __init__(
        self, machines: Machines, sent: dict[str, list[LayerSent]], nixl: NixlLink | None
    ) -> None:
        self.machines, self.sent, self.nixl = machines, sent, nixl
        self.pipeline = Pipeline(machines)
        self.lane = Lane(machines.source)
        self.whole = torch.empty_like(machines.kv_2LGND, device=machines.target)
        self.pages = paged(machines.kv_2LGND, PAGE).flatten(0, 1)
        there = torch.empty_like(self.pages, device=machines.target)
        self.page_pairs = list(zip(there.unbind(0), self.pages.unbind(0), strict=True))
        self.by_copy: list[_Blocking] = []
        self.by_pages: list[_Blocking] = []
        self.prefills: list[float] = []
        self.kept: dict[str, list[_Handed]] = {name: [] for name in sent}

    @property
    def count(self) -> int:
        """Things timed in a round."""
        return len(self.sent) + 1

    @property
    def copies(self) -> list[float]:
        """Seconds of a plain copy, a round each."""
        return [times.copy for times in self.by_copy]

    @property
    def copy_gb_s(self) -> float:
        """Of the plain copy."""
        return self.whole.nbytes / spread(self.copies)["median"] / 1e9

    def slow_link(self) -> str | None:
        """What to say of a NIXL link that runs far below a plain copy; None if it does not."""
        if self.nixl is None:
            return None
        kv_2LGND = self.machines.kv_2LGND
        nixl = min(self.nixl.move(kv_2LGND) for _ in range(3))
        copy = min(self._timed(self._copy) for _ in range(3))
        if nixl * SLOW <= copy:
            return None
        found, wanted = (kv_2LGND.nbytes / taken / 1e9 for taken in (nixl, copy))
        return (
            f"NIXL moves {found:.2g} GB/s where a plain copy makes {wanted:.2g}: see"
            " that UCX has a direct way between the two processes' memory"
        )

    def run(self, *, keep: bool, advance: Callable[[float], None]) -> None:
        """One round."""
        kv_2LGND, nixl = self.machines.kv_2LGND, self.nixl
        by_copy = _Blocking(
            copy=self._timed(self._copy), nixl=nixl.move(kv_2LGND) if nixl else None
        )
        by_pages = _Blocking(
            copy=self._timed(self._copy_pages),
            nixl=nixl.move(self.pages, len(self.page_pairs)) if nixl else None,
        )
        if keep:
            self.by_copy.append(by_copy)
            self.by_pages.append(by_pages)
        advance(1)
        for name, layers in self.sent.items():
            alone, datas = self.pipeline.alone(layers)
            nixl_L = [nixl.move(data) for data in datas] if nixl else None
            del datas
            plain = self.pipeline.run(None).prefill_s  # just before, as a GPU's clock wanders
            sending = self.pipeline.run(layers)
            whole = self.pipeline.run(layers, decode=True)
            if keep:
                self.prefills.append(plain)
                handed = _Handed(
                    alone=alone,
                    slower=sending.prefill_s / plain - 1,
                    encoded_L=sending.encoded_s,
                    exposed=whole.exposed_s,
                    nixl_L=nixl_L,
                )
                self.kept[name].append(handed)
            advance(1)

    def rows(self, link: str, gbit: float | None) -> list[dict[str, Any]]:
        """A link's rows.

        Args:
            gbit: its speed if it is paced.
        """
        said = link if gbit is None else f"{gbit:g} Gbit/s, paced"
        about = {"link": f"{said}, by NIXL" if self.nixl and gbit is None else said}
        about["paced"] = gbit is not None  # type: ignore[assignment]
        rows = []
        for name, times, size in (
            ("bf16, blocking", self.by_copy, self.whole.nbytes),
            (f"bf16 by pages of {PAGE}, blocking", self.by_pages, self.pages.nbytes),
        ):
            moves = [_moved(some.copy, some.nixl, size, gbit) for some in times]
            none = [0.0] * len(moves)
            rows.append(about | self._row(name, size, none, moves, none, moves, none))
        for name, kept in self.kept.items():
            moves_RL = [_layers_moved(handed, gbit) for handed in kept]
            exposed = [_exposed(*both, gbit) for both in zip(kept, moves_RL, strict=True)]
            row = self._row(
                name,
                sum(kept[-1].alone.bytes_L),
                [sum(handed.alone.encode_L) for handed in kept],
                [sum(moves_L) for moves_L in moves_RL],
                [sum(handed.alone.decode_L) for handed in kept],
                exposed,
                [handed.slower for handed in kept],
            )
            rows.append(about | row)
        return rows

    def _row(
        self,
        name: str,
        size: int,
        encodes: list[float],
        moves: list[float],
        decodes: list[float],
        exposed: list[float],
        slower: list[float],
    ) -> dict[str, Any]:
        parts = zip(encodes, moves, decodes, strict=True)
        gb_s = size / spread(moves)["median"] / 1e9
        return {
            "name": name,
            "bytes": size,
            "gbit": size * 8 / 1e9,
            "encode_s": spread(encodes),
            "move_s": spread(moves),
            "decode_s": spread(decodes),
            "in_turn_s": spread([sum(part) for part in parts]),
            "exposed_s": spread(exposed),
            "prefill_slower": spread(slower),
            "gb_s": gb_s,
            "share_of_copy": gb_s / self.copy_gb_s,
        }

    def _copy(self) -> None:
        self.whole.copy_(self.machines.kv_2LGND, non_blocking=True)

    def _copy_pages(self) -> None:
        for there, here in self.page_pairs:
            there.copy_(here, non_blocking=True)

    def _timed(self, run: Callable[[], object]) -> float:
        return timed(run, self.lane, self.machines.source, self.machines.target)


def _moved(copy: float, nixl: float | None, size: int, gbit: float | None) -> float:
    """Seconds that bytes take over a link."""
    if gbit is not None:
        return max(copy, size * 8 / (gbit * 1e9))
    return copy if nixl is None else nixl


def _layers_moved(handed: _Handed, gbit: float | None) -> list[float]:
    alone = handed.alone
    nixl_L: Sequence[float | None] = handed.nixl_L or [None] * len(alone.move_L)
    layers = zip(alone.move_L, nixl_L, alone.bytes_L, strict=True)
    return [_moved(*layer, gbit) for layer in layers]


def _exposed(handed: _Handed, moves_L: Sequence[float], gbit: float | None) -> float:
    """Measured where moves are copies, else reckoned from the same round."""
    if gbit is None and handed.nixl_L is None:
        return handed.exposed
    return arrival(handed.encoded_L, moves_L, handed.alone.decode_L)


def arrival(
    encoded_L: Sequence[float], move_L: Sequence[float], decode_L: Sequence[float]
) -> float:
    """When the last layer is decoded, if a link and a decoder each take layers one by one.

    Args:
        encoded_L: when each layer is encoded, in seconds of any clock; the result is of the same.
        move_L: seconds of the link; ``decode_L`` of the decoder.
    """
    link = decoder = -math.inf
    for encoded, move, decode in zip(encoded_L, move_L, decode_L, strict=True):
        link = max(encoded, link) + move
        decoder = max(link, decoder) + decode
    return decoder
