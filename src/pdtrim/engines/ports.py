"""Ports for servers that are about to be started.

Between the choice of a port and the server's bind lie seconds, in which any outgoing connection may
be given that port by the system, and the server dies or hangs. The system gives such connections
ports of one range only. The ports chosen here lie below it, and two processes that choose at the
same time begin at different ones.
"""

from __future__ import annotations

import itertools
import os
import socket
from pathlib import Path

from pdtrim.engines.config import LOOPBACK

GIVEN = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""The range that Linux gives to outgoing connections: its first and last port."""
LOWEST = 10_000
APART = 64
"""Ports between the first choices of processes whose numbers follow each other."""
_offers = itertools.count()


def free_port() -> int:
    """A loopback port that nobody listens on and that the system gives to nobody unasked.

    Where the system's range leaves no thousand ports above LOWEST, any free port.
    """
    span = _first_given() - LOWEST
    if span < 1000:
        return _bound(0)
    for offer in itertools.islice(_offers, span):
        try:
            return _bound(LOWEST + (os.getpid() * APART + offer) % span)
        except OSError:  # somebody listens there
            continue
    return _bound(0)


def _first_given() -> int:
    try:
        return int(GIVEN.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 32768  # of Linux; other systems begin higher


def _bound(port: int) -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, port))
        return int(probe.getsockname()[1])
