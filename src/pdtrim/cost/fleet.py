"""How many servers of each stage a load needs, and what it then waits for.

A request passes three lines: prefill servers (a prompt at a time, encoding included), their links,
and the places in decode's batches, whose steps last longer the more sequences there are. Arrivals
are random; the smallest fleet whose simulated time to the first token meets its target at the asked
quantile is taken.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from pdtrim.cost.load import Load, Requests
from pdtrim.cost.queueing import quantile, station
from pdtrim.cost.service import Service
from pdtrim.errors import PdtrimError

REQUESTS, MOST_REQUESTS = 8_000, 100_000
MOST_SERVERS = 20_000


class Unreachable(PdtrimError):
    """No number of servers meets the targets."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What the fleet must hold.

    Attributes:
        ttft: seconds to the first token, at ``quantile`` of the requests.
        tpot: seconds a token after it.
    """

    ttft: float
    tpot: float
    quantile: float = 0.95
    memory_use: float = 0.9


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """A fleet and what its requests see; seconds are means but for ``ttft_quantile_s``."""

    prefill_gpus: int
    decode_gpus: int
    prefill_load: float
    decode_load: float
    batch_limit: int
    batch: float
    ttft_s: float
    ttft_quantile_s: float
    tpot_s: float
    queue_s: float
    prefill_s: float
    front_s: float
    handover_s: float
    handover_bytes: float
    decode_kv_bytes: float
    goodput_per_gpu: float

    @property
    def gpus(self) -> int:
        """Of both stages."""
        return self.prefill_gpus + self.decode_gpus


@dataclass(frozen=True, kw_only=True)
class Waits:
    """What requests saw of a fleet.

    Attributes:
        prefill, link, decode: mean seconds in each line.
        ttft: seconds to the first token, of each request.
        tpot: mean seconds a token after it.
        batch: mean sequences of a decode server.
    """

    prefill: float
    link: float
    decode: float
    ttft: list[float]
    tpot: float
    batch: float


def size_fleet(service: Service, load: Load, targets: Targets, *, seed: int = 0) -> Fleet:
    """The smallest fleet that meets the targets.

    Args:
        load: with a rate.

    Raises:
        Unreachable: a single request on an empty fleet misses a target.
        PdtrimError: beyond what is measured, or more servers than are modelled.
    """
    assert load.rate is not None
    rate, prompt, answer = load.rate, load.mean_prompt, load.mean_answer
    rows, place_s = best_batch(service, prompt, answer, targets)
    busy = rate * (place_s + service.prefill_s(prompt))
    count = min(MOST_REQUESTS, max(REQUESTS, int(20 * busy)))
    alone = Simulation(service, load.drawn(count, random.Random(seed)), rows, warm=count // 10)
    prefill = int(rate * alone.prefill_mean) + 1
    decode = int(rate * place_s / rows) + 1
    if quantile(alone.empty(), targets.quantile) > targets.ttft:
        raise Unreachable(
            f"{service.pair.source}: without any queue the first token takes"
            f" {quantile(alone.empty(), targets.quantile):.3g} s, more than --ttft {targets.ttft:g}"
        )
    while True:
        if prefill + decode > MOST_SERVERS:
            raise PdtrimError(f"more than {MOST_SERVERS:,} servers: give a smaller --rate")
        waits = alone.run(prefill, decode)
        reached = quantile(waits.ttft, targets.quantile)
        if reached <= targets.ttft:
            break
        if waits.prefill + waits.link >= waits.decode:
            prefill += max(1, prefill // 50)
        else:
            decode += max(1, decode // 50)
    moved, gpus = service.handover(prompt), service.times.gpus
    return Fleet(
        prefill_gpus=prefill * gpus,
        decode_gpus=decode * gpus,
        prefill_load=rate * alone.prefill_mean / prefill,
        decode_load=rate * place_s / rows / decode,
        batch_limit=rows,
        batch=waits.batch,
        ttft_s=sum(waits.ttft) / len(waits.ttft),
        ttft_quantile_s=reached,
        tpot_s=waits.tpot,
        queue_s=waits.prefill + waits.link + waits.decode,
        prefill_s=service.prefill_s(prompt),
        front_s=service.times.front(prompt),
        handover_s=moved.seconds,
        handover_bytes=moved.sent_bytes,
        decode_kv_bytes=service.kv_bytes(prompt, answer) * waits.batch,
        goodput_per_gpu=rate / ((prefill + decode) * gpus),
    )


def best_batch(
    service: Service, prompt: float, answer: float, targets: Targets
) -> tuple[int, float]:
    """The batch that serves most within the TPOT target, and the seconds a place in it is taken.

    Raises:
        Unreachable: a batch of one misses the target.
        PdtrimError: beyond what is measured.
    """
    most = min(service.rows_in_memory(prompt, answer, targets.memory_use), service.times.most_rows)
    best: tuple[int, float] | None = None
    for rows in range(1, most + 1):
        place_s = answer * service.token_s(rows, prompt, answer)
        if place_s / answer > targets.tpot:
            continue
        if best is None or rows / place_s > best[0] / best[1]:
            best = rows, place_s
    if best is None:
        step, held = service.step_s(1, prompt, answer / 2), service.handover(prompt).held_s
        raise Unreachable(
            f"{service.pair.source}: a token takes {step:.3g} s in a batch of one, and taking a"
            f" cache in {held:.3g} s, more than --tpot {targets.tpot:g} allows"
        )
    return best


class Simulation:
    """One run of requests through fleets of any size.

    Args:
        rows: places of a decode server.
        warm: requests at the start that do not count.
    """

    def __init__(self, service: Service, requests: Requests, rows: int, *, warm: int = 0) -> None:
        prefill_s, moved = cache(service.prefill_s), cache(service.handover)
        self.service, self.rows, self.warm = service, rows, warm
        self.arrivals, lengths, count = requests.at, requests.lengths, len(requests.at)
        self.prompt, self.answer = (sum(column) / count for column in zip(*lengths, strict=True))
        place_s = self.answer * service.token_s(rows, self.prompt, self.answer)
        self.prefill = [prefill_s(p) + moved(p).encode_s for p, _ in lengths]
        self.wire = [moved(p).wire_s for p, _ in lengths]
        self.decode = [place_s * a / self.answer for _, a in lengths]
        hidden, front = service.link.overlap, service.times.front
        self.rest = [
            front(p) + moved(p).held_s - min(hidden * moved(p).seconds, prefill_s(p))
            for p, _ in lengths
        ]
        self.prefill_mean = sum(self.prefill) / count

    def empty(self) -> list[float]:
        """Seconds to the first token where nobody waits."""
        first = self.service.step_s(1, self.prompt, self.answer / 2)
        parts = zip(self.prefill, self.wire, self.rest, strict=True)
        return [sum(part) + first for part in parts]

    def run(self, prefill: int, decode: int) -> Waits:
        """What the requests see of a fleet of so many servers."""
        begun = station(self.arrivals, self.prefill, prefill)
        done = [at + s for at, s in zip(begun, self.prefill, strict=True)]
        sent = station(done, self.wire, prefill)
        there = [at + s for at, s in zip(sent, self.wire, strict=True)]
        placed = station(there, self.decode, decode * self.rows)
        batch = self._batch(len(there) / max(there) / decode)
        token = self.service.token_s(batch, self.prompt, self.answer)
        late = slice(self.warm, None)

        def wait(starts: list[float], since: Sequence[float]) -> float:
            pairs = list(zip(starts, since, strict=True))[late]
            return sum(start - before for start, before in pairs) / len(pairs)

        ends = zip(placed, self.rest, self.arrivals, strict=True)
        return Waits(
            prefill=wait(begun, self.arrivals),
            link=wait(sent, done),
            decode=wait(placed, there),
            ttft=[at + rest + token - came for at, rest, came in ends][late],
            tpot=token,
            batch=batch,
        )

    def _batch(self, rate: float) -> float:
        """Sequences that one decode server has at a time: arrivals times the time they stay."""
        rows = 1.0
        for _ in range(60):
            stay = self.answer * self.service.token_s(rows, self.prompt, self.answer)
            rows += 0.5 * (min(max(rate * stay, 1.0), self.rows) - rows)
        return rows
