"""Queues by simulation: requests arrive at random, wait in one line, and are served in order.

A fleet is a row of such stations. First come, first served makes each of them a pass over its
arrivals with a heap of the times at which servers fall free.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence


def poisson_arrivals(rate: float, count: int, rng: random.Random) -> list[float]:
    """Times of ``count`` arrivals, ``rate`` a second, in seconds from 0."""
    at, times = 0.0, []
    for _ in range(count):
        at += rng.expovariate(rate)
        times.append(at)
    return times


def station(arrivals: Sequence[float], service: Sequence[float], servers: int) -> list[float]:
    """When each request's service begins.

    Args:
        arrivals: in seconds, in any order; the earlier is served first.
        service: seconds that each needs.
        servers: that work side by side on one line of requests.
    """
    assert servers > 0 and len(arrivals) == len(service)
    free = [0.0] * min(servers, len(arrivals))
    starts = [0.0] * len(arrivals)
    for i in sorted(range(len(arrivals)), key=arrivals.__getitem__):
        starts[i] = max(arrivals[i], free[0])
        heapq.heapreplace(free, starts[i] + service[i])
    return starts


def quantile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
