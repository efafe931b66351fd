"""What a handover costs: seconds that prefill and decode wait for it, by KV policy and link.

Keys and values are random; prefill is real: one random block of the shape runs as often as the
model has blocks, through the code that stages run, and each layer's cache is encoded and moved on
lanes of its own while the next layers compute. *Exposed* is the time from the end of prefill's
last kernel until decode has every layer. Encoding, moving and decoding are timed alone as well.

A link that is *measured* is a copy to the receiving device, beside prefill and decoding. One that
is *paced* is reckoned from the same run: each layer's move takes as long as its bytes at the link's
speed, or as its copy if that is longer, and begins when the layer is encoded and the link is free.

Shapes: L layers, G KV heads, N prompt tokens, D head width, E hidden width; 2 for K and V.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pdtrim.bench.lanes import Lane, finish, seconds, spread
from pdtrim.bench.pipeline import Alone, Machines, Pipeline
from pdtrim.bench.shapes import one_block, random_model, shape_config
from pdtrim.bench.traffic import (
    LayerSent,
    Sizes,
    layers_sent,
    paged,
    paper_rule,
    random_cache,
)
from pdtrim.errors import PdtrimError
from pdtrim.models.configs import head_width
from pdtrim.models.loading import DTYPES
from pdtrim.progress import Progress, silent

POLICIES = (
    "full",
    "full+int4",
    "full+k3v2:rotate=true",
    "full+int2:rotate=true",
    "full+entropy",
    "full+lossless",
)
PAGE = 16  # tokens of a page of a serving engine
MEASURED = "measured"


@torch.inference_mode()
def bench_transfer(
    shape: str,
    *,
    tokens: int,
    links: Sequence[str] = (MEASURED,),
    policies: Sequence[str] = POLICIES,
    dtype: str = "bfloat16",
    device: str = "cpu",
    to: str | None = None,
    repeats: int = 5,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Time handovers of a shape, all rows in interleaved rounds behind one that warms up.

    Args:
        shape: a name in ``SHAPES``, or a folder with a ``config.json``.
        tokens: of the prompt that prefill runs.
        links: ``measured``, or Gbit/s.
        policies: KV policies that need no prompt, beside the rows that are always there.
        to: the device that receives; the second GPU where there is one, else ``device``.

    Returns:
        What was timed on what, and ``rows``: one for each way to hand over and each link. A time
        is its median over rounds, its least and its most.

    Raises:
        PdtrimError: a shape, a policy, a link or a number that cannot be timed.
    """
    if dtype not in DTYPES:
        raise PdtrimError(f"unknown dtype '{dtype}': use one of {', '.join(DTYPES)}")
    if tokens < 1 or repeats < 1:
        raise PdtrimError("tokens and repeats: at least one of each")
    speeds = {link: _gbit(link) for link in links or (MEASURED,)}
    config = shape_config(shape)
    sizes = Sizes(
        layers=config.num_hidden_layers,
        heads=config.num_key_value_heads,
        tokens=tokens,
        width=head_width(config),
    )
    source, target = _devices(device, to)
    sent = {
        name: layers_sent(policy, sizes, source)
        for name, policy in (("paper's rule", paper_rule(sizes)), *((p, p) for p in policies))
    }
    model = random_model(one_block(config), dtype=DTYPES[dtype], device=source, name=shape)
    machines = Machines(model, random_cache(sizes, DTYPES[dtype], source), sizes, target)
    rounds = _Rounds(machines, sent)
    with progress("timing the handovers", (repeats + 1) * rounds.count) as advance:
        for repeat in range(repeats + 1):  # the first round warms up
            rounds.run(keep=repeat > 0, advance=advance)
    return {
        "shape": shape,
        "tokens": tokens,
        "layers": sizes.layers,
        "kv_heads": sizes.heads,
        "width": sizes.width,
        "dtype": dtype,
        "device": str(source),
        "to": str(target),
        "copy": _copy_said(source, target),
        "hardware": torch.cuda.get_device_name(source) if source.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "raw_bytes": sizes.raw_bytes(DTYPES[dtype]),
        "copy_gb_s": rounds.copy_gb_s,
        "copy_s": spread(rounds.copies),
        "prefill_s": spread(rounds.prefills),
        "rows": [row for link, gbit in speeds.items() for row in rounds.rows(link, gbit)],
    }


def _gbit(link: str) -> float | None:
    """The link's speed; None if it is measured."""
    if link == MEASURED:
        return None
    try:
        speed = float(link)
    except ValueError:
        speed = math.nan
    if not 0 < speed < math.inf:
        raise PdtrimError(f"link '{link}': give {MEASURED}, or its speed in Gbit/s")
    return speed


def _devices(device: str, to: str | None) -> tuple[torch.device, torch.device]:
    """The device that sends and the one that receives, with their numbers."""
    found = []
    for name in (device, to or device):
        try:
            place = torch.device(name)
        except RuntimeError:
            raise PdtrimError(f"no device '{name}': give cpu, cuda or cuda:NUMBER") from None
        if place.type == "cuda":
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            place = torch.device("cuda", place.index or 0)
            if place.index >= count:
                raise PdtrimError(f"device '{name}': torch finds {count} GPUs here")
        elif place.type != "cpu":
            raise PdtrimError(f"no device '{name}': give cpu, cuda or cuda:NUMBER")
        found.append(place)
    source, target = found
    if source.type != target.type:
        raise PdtrimError(f"from {source} to {target}: both must be GPUs, or both the CPU")
    if to is None and source.type == "cuda" and torch.cuda.device_count() > 1:
        target = torch.device("cuda", (source.index + 1) % torch.cuda.device_count())
    return source, target


def _copy_said(source: torch.device, target: torch.device) -> str:
    if source == target:
        return f"a local copy on {source}; prefill and decoding share it"
    if torch.cuda.can_device_access_peer(source, target):
        return f"a peer copy from {source} to {target}"
    return f"a copy from {source} to {target} through the host: they are no peers"


class _Rounds:
    """All rows, timed in turn, and what was kept of each round."""

    def __init__(self, machines: Machines, sent: dict[str, list[LayerSent]]) -> None:
        self.machines, self.sent = machines, sent
        self.pipeline = Pipeline(machines)
        self.lane = Lane(machines.source)
        self.whole = torch.empty_like(machines.kv_2LGND, device=machines.target)
        pages = paged(machines.kv_2LGND, PAGE).flatten(0, 1)
        self.paged = torch.empty_like(pages, device=machines.target)
        self.pages = list(zip(self.paged.unbind(0), pages.unbind(0), strict=True))
        self.copies: list[float] = []
        self.by_pages: list[float] = []
        self.prefills: list[float] = []
        self.kept: dict[str, list[tuple[Alone, float, list[float], float]]] = {n: [] for n in sent}

    @property
    def count(self) -> int:
        """Things timed in a round."""
        return len(self.sent) + 1

    @property
    def copy_gb_s(self) -> float:
        """Of the plain copy."""
        return self.whole.nbytes / spread(self.copies)["median"] / 1e9

    def run(self, *, keep: bool, advance: Callable[[float], None]) -> None:
        """One round."""
        copy = self._timed(lambda: self.whole.copy_(self.machines.kv_2LGND, non_blocking=True))
        by_pages = self._timed(self._copy_pages)
        advance(1)
        if keep:
            self.copies.append(copy)
            self.by_pages.append(by_pages)
        for name, layers in self.sent.items():
            alone = self.pipeline.alone(layers)
            plain = self.pipeline.run(None).prefill_s  # just before, as a GPU's clock wanders
            sending = self.pipeline.run(layers)
            whole = self.pipeline.run(layers, decode=True)
            if keep:
                self.prefills.append(plain)
                slower = sending.prefill_s / plain - 1
                self.kept[name].append((alone, slower, sending.encoded_s, whole.exposed_s))
            advance(1)

    def rows(self, link: str, gbit: float | None) -> list[dict[str, Any]]:
        """A link's rows."""
        about = {"link": link if gbit is None else f"{gbit:g} Gbit/s, paced", "paced": bool(gbit)}
        rows = []
        for name, times, sent in (
            ("bf16, blocking", self.copies, self.whole),
            (f"bf16 by pages of {PAGE}, blocking", self.by_pages, self.paged),
        ):
            moves = [_move(some, sent.nbytes, gbit) for some in times]
            none = [0.0] * len(moves)
            rows.append(about | self._row(name, sent.nbytes, none, moves, none, moves, none))
        for name, kept in self.kept.items():
            size = kept[-1][0].bytes_L
            encodes = [sum(alone.encode_L) for alone, *_ in kept]
            decodes = [sum(alone.decode_L) for alone, *_ in kept]
            moves_RL = [
                [_move(some, n, gbit) for some, n in zip(alone.move_L, alone.bytes_L, strict=True)]
                for alone, *_ in kept
            ]
            exposed = [
                whole if gbit is None else arrival(encoded, moves_L, alone.decode_L)
                for (alone, _, encoded, whole), moves_L in zip(kept, moves_RL, strict=True)
            ]
            moves = [sum(moves_L) for moves_L in moves_RL]
            slower = [entry[1] for entry in kept]
            rows.append(
                about | self._row(name, sum(size), encodes, moves, decodes, exposed, slower)
            )
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

    def _copy_pages(self) -> None:
        for there, here in self.pages:
            there.copy_(here, non_blocking=True)

    def _timed(self, run: Callable[[], object]) -> float:
        finish(self.machines.source, self.machines.target)
        with self.lane.work():
            start = self.lane.mark()
            run()
            stop = self.lane.mark()
        finish(self.machines.source, self.machines.target)
        return seconds(start, stop)


def _move(copied: float, size: int, gbit: float | None) -> float:
    """Seconds that bytes take over a link whose copy took so long."""
    return copied if gbit is None else max(copied, size * 8 / (gbit * 1e9))


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
