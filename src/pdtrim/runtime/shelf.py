"""Prefill's memory that decode reads by NIXL: coded layers, each in a slot of a ring."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from pdtrim.kv.checksum import checksum
from pdtrim.kv.wire import HOST, Pool, in_words
from pdtrim.runtime.nixl import Registered, bind, number_of, stage_agent
from pdtrim.runtime.slots import Slots

TICK_S = 1e-3


class Shelf:
    """Prefill's agent and its ring.

    Raises:
        PdtrimError: NIXL is not installed, or does not start.
    """

    def __init__(self, device: torch.device) -> None:
        bind(device)
        self._device = device
        self._agent = stage_agent("prefill")
        self._ring = Registered(self._agent, device)
        self._metadata = b""

    def fit(self, slots: Slots) -> Pool:
        """Have room for a batch; returns where decode finds it."""
        if self._ring.grow(slots.nbytes) or not self._metadata:
            self._metadata = self._agent.get_agent_metadata()
        return Pool(
            address=self._ring.memory.data_ptr(),
            device=number_of(self._device) if self._device.type == "cuda" else HOST,
            metadata=self._metadata,
        )

    def lay(self, start: int, pieces: Sequence[Tensor]) -> tuple[int, Tensor]:
        """Put pieces of bytes side by side; returns their bytes and the checksum, int64 ``[]``.

        On a GPU that is so once the current stream has been waited for.
        """
        room, count = self._ring.memory[start:], 0
        for piece in pieces:
            room[count : count + piece.numel()].copy_(piece, non_blocking=True)
            count += piece.numel()
        words = room[: in_words(count)]
        words[count:].zero_()
        return count, checksum(words)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Let decode connect and read; a copy between GPUs needs nobody here, other ways do."""
        done = threading.Event()

        def answer() -> None:
            bind(self._device)
            while not done.wait(TICK_S):
                self._agent.get_new_notifs()

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
