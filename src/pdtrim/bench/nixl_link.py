"""Moves into and out of another process by NIXL over UCX, as engines hand caches over.

The other process, ``python -m pdtrim.bench.nixl_link``, owns a buffer on the receiving device,
says where it is on its standard output, and ends when its standard input does. Both sides register
one buffer; each move writes from one into the other, or reads, by as many descriptors as it is
asked for.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
from typing import Any, Literal

import torch
from torch import Tensor

from pdtrim.errors import PdtrimError
from pdtrim.runtime.nixl import LOG, descriptors, make_agent
from pdtrim.runtime.start import child_env, python_module

SAYS = "pdtrim-nixl "
"""What the other process's line begins with."""


class NixlLink:
    """A buffer here, one in another process, and moves between them.

    Args:
        size: bytes of both buffers.

    Raises:
        PdtrimError: NIXL is not installed, or the other process cannot start.
    """

    def __init__(self, source: torch.device, target: torch.device, size: int) -> None:
        self._source = source
        self._buffer = torch.empty(size, dtype=torch.uint8, device=source)
        self._agent = make_agent("pdtrim-source")
        self._registered = self._agent.register_memory(self._buffer)
        self._process = subprocess.Popen(
            python_module("pdtrim.bench.nixl_link", str(target), str(size)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=child_env(LOG),
            text=True,
        )
        assert self._process.stdout is not None
        said = next((line for line in self._process.stdout if line.startswith(SAYS)), None)
        if said is None:
            self.close()
            raise PdtrimError(f"the process that receives by NIXL on {target} did not start")
        there = json.loads(said.removeprefix(SAYS))
        self._address, self._target = there["address"], target
        self._name = self._agent.add_remote_agent(base64.b64decode(there["metadata"]))

    def move(self, data: Tensor, pieces: int = 1) -> float:
        """Seconds from building descriptors until NIXL says that all bytes are there.

        Args:
            data: a contiguous tensor; it is put into the registered buffer first, untimed.
            pieces: descriptors of one length, into which its bytes are cut.

        Raises:
            PdtrimError: NIXL reports an error.
        """
        flat = data.reshape(-1).view(torch.uint8)
        assert flat.numel() <= self._buffer.numel() and flat.numel() % pieces == 0
        self._buffer[: flat.numel()].copy_(flat)
        if self._source.type == "cuda":
            torch.cuda.synchronize(self._source)
        started = time.perf_counter()
        return self._run("WRITE", flat.numel(), self._ends(flat.numel(), pieces)) - started

    def read(self, count: int, pieces: int = 1) -> float:
        """Seconds in which so many of the other buffer's bytes are read into the one here.

        Descriptors are built before, as an engine prepares those of its pages once.

        Args:
            pieces: descriptors of one length, into which the bytes are cut.

        Raises:
            PdtrimError: NIXL reports an error.
        """
        assert count <= self._buffer.numel() and count % pieces == 0
        ends = self._ends(count, pieces)
        started = time.perf_counter()
        return self._run("READ", count, ends) - started

    def _ends(self, count: int, pieces: int) -> list[Any]:
        """Descriptors here, and of the other buffer."""
        size = count // pieces
        ranges = [(i * size, size) for i in range(pieces)]
        places = ((self._buffer.data_ptr(), self._source), (self._address, self._target))
        return [descriptors(self._agent, start, ranges, place) for start, place in places]

    def _run(self, operation: Literal["READ", "WRITE"], count: int, ends: list[Any]) -> float:
        """The clock when the bytes are there."""
        handle = self._agent.initialize_xfer(operation, *ends, self._name)
        state = self._agent.transfer(handle)
        while state == "PROC":
            state = self._agent.check_xfer_state(handle)
        done = time.perf_counter()
        self._agent.release_xfer_handle(handle)
        if state != "DONE":
            raise PdtrimError(f"NIXL could not move {count} bytes: its state is {state}")
        return done

    def received(self, count: int) -> int:
        """The sum of the first bytes that lie in the other process."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{count}\n")
        process.stdin.flush()
        said = next(line for line in process.stdout if line.startswith(SAYS))
        return int(said.removeprefix(SAYS))

    def close(self) -> None:
        """End the other process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _receive(place: str, size: int) -> None:
    """Own a buffer until standard input ends; a number there asks for the sum of so many bytes."""
    buffer = torch.zeros(size, dtype=torch.uint8, device=torch.device(place))
    agent = make_agent("pdtrim-target")
    agent.register_memory(buffer)
    metadata = base64.b64encode(agent.get_agent_metadata()).decode()
    print(SAYS + json.dumps({"address": buffer.data_ptr(), "metadata": metadata}), flush=True)
    for line in sys.stdin:
        print(f"{SAYS}{int(buffer[: int(line)].sum())}", flush=True)


if __name__ == "__main__":
    _receive(sys.argv[1], int(sys.argv[2]))
