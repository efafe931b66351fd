"""Decode's side of NIXL: reads coded layers out of prefill's memory into its own.

A READ has one side that decides: how many bytes come, and to where, are numbers of decode, which
the plan bounds. Nobody else can write to the memory that they come to, so that what was checked is
what is decoded.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pdtrim.errors import WireError
from pdtrim.kv.wire import HOST, PART_TIMEOUT_S, Pool, in_words
from pdtrim.runtime.nixl import Registered, bind, descriptors, stage_agent
from pdtrim.runtime.slots import Slots

EAGER_S = 1e-3
"""A transfer is asked about without a rest for so long, and then every ``REST_S``."""
REST_S = 1e-4


class Fetcher:
    """Decode's agent and its ring.

    Attributes:
        lock: of whoever reads a batch, until that is decoded.

    Raises:
        PdtrimError: NIXL is not installed, or does not start.
    """

    def __init__(self, device: torch.device) -> None:
        bind(device)
        self.lock = threading.Lock()
        self._agent = stage_agent("decode")
        self._ring = Registered(self._agent, device)
        self._device = device
        self._peer: Any = None
        self._pool: Pool | None = None
        self._slots: Slots | None = None

    def open(self, pool: Pool, slots: Slots) -> None:
        """Read a batch from prefill's ring.

        Raises:
            WireError: NIXL knows no such agent or memory.
        """
        bind(self._device)
        self._ring.grow(slots.nbytes)
        self._slots = slots
        if pool == self._pool:
            return
        try:
            peer = self._agent.add_remote_agent(pool.metadata)
        except Exception as error:  # the bindings' own classes
            raise WireError(f"NIXL cannot reach prefill's memory: {error}") from error
        if peer != self._peer:
            self._forget()
        self._peer, self._pool = peer, pool

    def fetch(self, at: int, sizes: Sequence[int]) -> list[Tensor]:
        """Each request's bytes of the n-th layer that travels, up to whole words.

        They stay until ``SLOTS`` further layers have been fetched.

        Args:
            sizes: of each request, within its place.

        Raises:
            WireError: they cannot be read.
        """
        assert self._slots is not None
        starts = [self._slots.start(at, row) for row in range(len(sizes))]
        ranges = [(start, in_words(size)) for start, size in zip(starts, sizes, strict=True)]
        if wanted := [part for part in ranges if part[1]]:
            try:
                self._read(wanted)
            except Exception as error:  # the bindings' own classes among them
                self._forget()  # the next batch connects anew
                if isinstance(error, WireError):
                    raise
                raise WireError(f"NIXL cannot read prefill's memory: {error}") from error
        return [self._ring.memory[start : start + size] for start, size in ranges]

    def _forget(self) -> None:
        """Leave the agent that was read from, which may be gone."""
        if self._peer is not None:
            with contextlib.suppress(Exception):  # the bindings' own classes
                self._agent.remove_remote_agent(self._peer)
        self._peer = self._pool = None

    def _read(self, ranges: list[tuple[int, int]]) -> None:
        assert self._pool is not None
        on_host = self._pool.device == HOST
        away = torch.device("cpu") if on_host else torch.device("cuda", self._pool.device)
        handle = self._agent.initialize_xfer(
            "READ",
            self._ring.descriptors(ranges),
            descriptors(self._agent, self._pool.address, ranges, away),
            self._peer,
        )
        started = time.monotonic()
        state = self._agent.transfer(handle)
        while state == "PROC":
            waited = time.monotonic() - started
            if waited > PART_TIMEOUT_S:
                raise WireError(f"NIXL has not read a layer within {waited:.0f} s")
            time.sleep(0 if waited < EAGER_S else REST_S)  # the decoder's thread has its turn
            state = self._agent.check_xfer_state(handle)
        self._agent.release_xfer_handle(handle)
        if state != "DONE":
            raise WireError(f"NIXL could not read a layer: its state is {state}")
