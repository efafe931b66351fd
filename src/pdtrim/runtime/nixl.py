"""An agent of NIXL over UCX, and memory that it knows."""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING, Any

import torch

from pdtrim.clock import finish
from pdtrim.errors import PdtrimError
from pdtrim.runtime.config import NEEDED

if TYPE_CHECKING:
    from pdtrim.plan import Stage

LOG = {"NIXL_LOG_LEVEL": "WARN"}
READS_BY_COPY = "UCX_CUDA_IPC_ENABLE_GET_ZCOPY"
"""Decode reads prefill's memory. UCX 1.x decides by itself whether GPUs of one host may copy for a
READ, and where it decides against it emulates the READ on the CPU: 0.5 GB/s in place of 1,000
between two processes of one H100."""


def make_agent(name: str, *, spins: bool = True) -> Any:
    """An agent by a name that no other agent near it has.

    Args:
        spins: with NIXL's own progress thread, which takes a core for as long as the agent lives;
            else the agent works only while it is asked for something, from any thread.

    Raises:
        PdtrimError: NIXL is not installed, or UCX does not start.
    """
    for key, value in LOG.items():
        os.environ.setdefault(key, value)
    try:
        from nixl._api import nixl_agent, nixl_agent_config, nixl_thread_sync_t
    except ImportError as error:
        raise PdtrimError(NEEDED) from error
    sync = None if spins else nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
    config = nixl_agent_config(enable_prog_thread=spins, backends=["UCX"], sync_mode=sync)
    try:
        return nixl_agent(name, config)
    except Exception as error:  # the bindings' own classes
        raise PdtrimError(f"NIXL does not start: {error}") from error


def stage_agent(stage: Stage) -> Any:
    """An agent of one process of a session, which works only while it is asked.

    Raises:
        PdtrimError: as :func:`make_agent`.
    """
    os.environ.setdefault(READS_BY_COPY, "on")
    return make_agent(f"pdtrim-{stage}-{secrets.token_hex(8)}", spins=False)


def kind_of(device: torch.device) -> str:
    """NIXL's word for a device's memory."""
    return "VRAM" if device.type == "cuda" else "DRAM"


def number_of(device: torch.device) -> int:
    """A device's number among those of its kind."""
    return device.index or 0


def bind(device: torch.device) -> None:
    """Make a GPU the calling thread's own: UCX works on the one that it finds there."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)  # only a first call makes the thread's context


class Registered:
    """Memory of a device, all or parts of which an agent moves."""

    def __init__(self, agent: Any, device: torch.device) -> None:
        self._agent, self._device = agent, device
        self._registration: Any = None
        self.memory = torch.empty(0, dtype=torch.uint8, device=device)

    def grow(self, nbytes: int) -> bool:
        """Have at least so many bytes; whether the memory is another one now.

        Raises:
            PdtrimError: NIXL cannot register them.
        """
        if nbytes <= self.memory.numel():
            return False
        self.release()
        bind(self._device)
        self.memory = torch.zeros(nbytes, dtype=torch.uint8, device=self._device)
        finish(self._device)  # no stream orders what NIXL writes
        try:
            self._registration = self._agent.register_memory(self.memory)
        except Exception as error:  # the bindings' own classes
            raise PdtrimError(
                f"NIXL cannot register {nbytes} bytes of {self._device}: {error}"
            ) from error
        return True

    def release(self) -> None:
        """Forget the memory."""
        if self._registration is not None:
            self._agent.deregister_memory(self._registration)
            self._registration = None
        self.memory = self.memory.new_empty(0)

    def descriptors(self, ranges: list[tuple[int, int]]) -> Any:
        """NIXL's descriptors of ranges ``(start, bytes)`` of this memory."""
        return descriptors(self._agent, self.memory.data_ptr(), ranges, self._device)


def descriptors(
    agent: Any, address: int, ranges: list[tuple[int, int]], device: torch.device
) -> Any:
    """NIXL's descriptors of ranges ``(start, bytes)`` behind an address on a device."""
    number = number_of(device)
    places = [(address + start, size, number) for start, size in ranges]
    return agent.get_xfer_descs(places, kind_of(device))
