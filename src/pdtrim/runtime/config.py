"""Where the two stages of a session run, and how keys and values travel between them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, get_args

from pdtrim.errors import PdtrimError

DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,3})?")
Way = Literal["socket", "nixl"]
Transport = Literal["auto", "socket", "nixl"]
NEEDED = "transport nixl needs a package: run 'pip install pdtrim[nixl]'"


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Devices of the stages, and the transport.

    Attributes:
        prefill_device: where prefill runs: cpu, cuda or cuda:NUMBER.
        decode_device: where decode runs: cpu, cuda or cuda:NUMBER.
        transport: how keys and values travel: socket, nixl (from one stage's memory into the
            other's), or auto, which is nixl if both stages run on GPUs and the package is there.

    Raises:
        PdtrimError: no such device or transport, or NIXL is asked for and not installed.
    """

    prefill_device: str = "cpu"
    decode_device: str = "cpu"
    transport: Transport = "auto"

    def __post_init__(self) -> None:
        if self.transport not in get_args(Transport):
            raise PdtrimError(f"unknown transport '{self.transport}': use auto, socket or nixl")
        if self.transport == "nixl" and not installed():
            raise PdtrimError(NEEDED)
        for name in self.devices:
            if not DEVICE.fullmatch(name):
                raise PdtrimError(f"no device '{name}': give cpu, cuda or cuda:NUMBER")

    @property
    def devices(self) -> tuple[str, str]:
        """Prefill's and decode's."""
        return self.prefill_device, self.decode_device

    @property
    def way(self) -> Way:
        """The transport that runs."""
        if self.transport != "auto":
            return self.transport
        gpus = all(name.startswith("cuda") for name in self.devices)
        return "nixl" if gpus and installed() else "socket"


def installed() -> bool:
    """Whether NIXL can be imported here."""
    return find_spec("nixl") is not None
