"""How many requests a decode server has pages for, by its own metrics."""

from __future__ import annotations

import re

from pdtrim.cost.metrics import fetch
from pdtrim.engines.base import Process
from pdtrim.engines.config import ServeConfig
from pdtrim.engines.pages import groups, pages_of
from pdtrim.errors import PdtrimError
from pdtrim.exported import longest_of, read_pair

FEW = 4
"""Requests of the longest kind; fewer are worth a warning."""
INFO = re.compile(r"^vllm:cache_config_info\{(.*)\}", re.MULTILINE)


def room(config: ServeConfig, server: Process) -> str | None:
    """A line on what a decode server's pages hold; None of other servers.

    Args:
        server: it answers.
    """
    if not server.name.startswith("decode"):
        return None
    try:
        said = fetch(f"{server.url}/metrics").decode(errors="replace")
    except PdtrimError as error:
        return f"{server.name} does not say how many pages it has: {error}"
    info = INFO.search(said)
    number, size = (
        re.search(rf'{name}="(\d+)"', info.group(1)) if info else None
        for name in ("num_gpu_blocks", "block_size")
    )
    if number is None or size is None:
        return f"{server.name} does not say how many pages it has"
    configs, plan = read_pair(config.pair)
    longest = config.max_model_len or longest_of(configs["decode"])
    each = groups(plan)[0] * pages_of(longest, int(size.group(1)))
    pages = int(number.group(1)) - 1  # one is the null block
    held = pages / each
    text = f"{server.name}: {pages:,} pages, {held:.1f} of the longest requests"
    if held < FEW:
        text = f"warning: {text}: it will preempt where several are long, give it more memory"
    return f"{text} ({longest:,} tokens, {each:,} pages without a hole)"
