"""What a handover costs: seconds that prefill and decode wait for it, by KV policy and link.

Keys and values are random; prefill is real: one random block of the shape runs as often as the
model has blocks, through the code that stages run, and each layer's cache is encoded and moved on
lanes of its own while the next layers compute. *Exposed* is the time from the end of prefill's
last kernel until decode has every layer. Encoding, moving and decoding are timed alone as well.

A link that is *measured* is a copy to the receiving device, beside prefill and decoding. One that
is *paced* is reckoned from the same run: each layer's move takes as long as its bytes at the link's
speed, or as its copy if that is longer, and begins when the layer is encoded and the link is free.
With transport ``nixl`` a measured move is one into another process, timed by itself, and exposed
times are reckoned from it in the same way.

Shapes: L layers, G KV heads, N prompt tokens, D head width, E hidden width; 2 for K and V.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any, get_args

import torch
from transformers import PreTrainedConfig

from pdtrim.bench.configs import MEASURED, TransferConfig, Transport
from pdtrim.bench.lanes import facts_of, spread
from pdtrim.bench.pipeline import Machines
from pdtrim.bench.rounds import Rounds
from pdtrim.bench.shapes import one_block, random_model, shape_config
from pdtrim.bench.traffic import LayerSent, Sizes, layers_sent, paper_rule, random_cache
from pdtrim.devices import device_of
from pdtrim.errors import PdtrimError
from pdtrim.models.block import head_width
from pdtrim.models.loading import dtype_named
from pdtrim.progress import Progress, silent


@torch.inference_mode()
def bench_transfer(
    shape: str,
    config: TransferConfig = TransferConfig(),
    *,
    dtype: str = "bfloat16",
    device: str = "cpu",
    progress: Progress = silent,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Time handovers of a shape, all rows in interleaved rounds behind one that warms up.

    Args:
        shape: a name in ``SHAPES``, or a folder with a ``config.json``.
        device: runs prefill and sends.
        say: takes a line for people before the rounds, if NIXL runs far below a plain copy.

    Returns:
        What was timed on what, and ``rows``: one for each way to hand over and each link. A time
        is its median over rounds, its least and its most.

    Raises:
        PdtrimError: a shape, a policy, a link or a number that cannot be timed.
    """
    kind = dtype_named(dtype)
    if config.transport not in get_args(Transport):
        raise PdtrimError(f"unknown transport '{config.transport}': use copy or nixl")
    if config.tokens < 1 or config.repeats < 1:
        raise PdtrimError("tokens and repeats: at least one of each")
    speeds = {link: _gbit(link) for link in config.links or (MEASURED,)}
    of_shape = shape_config(shape)
    sizes = _sizes(of_shape, config.tokens)
    source, target = _devices(device, config.to)
    policies = {"paper's rule": paper_rule(sizes), **{text: text for text in config.policies}}
    sent = {name: layers_sent(policy, sizes, source) for name, policy in policies.items()}
    model = random_model(one_block(of_shape), dtype=kind, device=source, name=shape)
    machines = Machines(model, random_cache(sizes, kind, source), sizes, target)
    rounds, slow = _timed(machines, sent, config, progress, say)
    return {
        "shape": shape,
        "tokens": config.tokens,
        "layers": sizes.layers,
        "kv_heads": sizes.heads,
        "width": sizes.width,
        "dtype": dtype,
        **facts_of(source),
        "to": str(target),
        "copy": _copy_said(source, target),
        "transport": config.transport,
        "slow_link": slow,
        "repeats": config.repeats,
        "raw_bytes": sizes.raw_bytes(kind),
        "copy_gb_s": rounds.copy_gb_s,
        "copy_s": spread(rounds.copies),
        "prefill_s": spread(rounds.prefills),
        "rows": [row for link, gbit in speeds.items() for row in rounds.rows(link, gbit)],
    }


def _sizes(shape: PreTrainedConfig, tokens: int) -> Sizes:
    return Sizes(
        layers=shape.num_hidden_layers,
        heads=shape.num_key_value_heads,
        tokens=tokens,
        width=head_width(shape),
    )


def _timed(
    machines: Machines,
    sent: dict[str, list[LayerSent]],
    config: TransferConfig,
    progress: Progress,
    say: Callable[[str], None],
) -> tuple[Rounds, str | None]:
    """All rounds, and what is to be said of a slow NIXL link."""
    with ExitStack() as stack:
        nixl = None
        if config.transport == "nixl":
            from pdtrim.bench.nixl_link import NixlLink

            # twice the cache holds its pages, and a code that makes a layer little larger
            size = 2 * machines.kv_2LGND.nbytes
            nixl = stack.enter_context(closing(NixlLink(machines.source, machines.target, size)))
        rounds = Rounds(machines, sent, nixl)
        slow = rounds.slow_link()
        if slow:
            say(slow)
        turns = (config.repeats + 1) * rounds.count
        advance = stack.enter_context(progress("timing the handovers", turns))
        for repeat in range(config.repeats + 1):  # the first round warms up
            rounds.run(keep=repeat > 0, advance=advance)
    return rounds, slow


def _gbit(link: str) -> float | None:
    """The link's speed; None if it is measured."""
    if link == MEASURED:
        return None
    try:
        speed = float(link)
    except ValueError:
        speed = math.nan
    if not 0 < speed < math.inf:
        raise PdtrimError(f"link '{link}': give {MEASURED}, or its speed in Gbit/s")
    return speed


def _devices(device: str, to: str | None) -> tuple[torch.device, torch.device]:
    """The device that sends and the one that receives, with their numbers."""
    source, target = device_of(device), device_of(to or device)
    if source.type != target.type:
        raise PdtrimError(f"from {source} to {target}: both must be GPUs, or both the CPU")
    if to is None and source.type == "cuda" and torch.cuda.device_count() > 1:
        target = torch.device("cuda", (source.index + 1) % torch.cuda.device_count())
    return source, target


def _copy_said(source: torch.device, target: torch.device) -> str:
    if source == target:
        return f"a local copy on {source}; prefill and decoding share it"
    if torch.cuda.can_device_access_peer(source, target):
        return f"a peer copy from {source} to {target}"
    return f"a copy from {source} to {target} through the host: they are no peers"
