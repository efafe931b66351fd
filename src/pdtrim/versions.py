"""Versions and host facts that results carry."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version


def versions() -> dict[str, str]:
    """Of the packages that numbers depend on."""
    names = ("pdtrim", "torch", "transformers")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def host() -> dict[str, str | int]:
    """The machine, without its name."""
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor()
