"""Seconds of prefill and of a decoded token against blocks removed, on random weights of a shape.

Prefill loses blocks as in mode ``projected``: they still make keys and values. Decode loses whole
blocks. Where the stage runs on a GPU its work is captured once and replayed, as an engine does, so
that launches from Python do not hide what fewer blocks save. Blocks with a sliding window are not
captured, because what they read depends on the position.

Shapes: N prompt tokens, L layers, G KV heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pdtrim.bench.lanes import Lane, device_of, finish, seconds, spread
from pdtrim.bench.shapes import random_model, shape_config
from pdtrim.errors import PdtrimError
from pdtrim.kv.groups import HeadGroup
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.models.loading import DTYPES
from pdtrim.models.model import Model
from pdtrim.plan import Gates
from pdtrim.progress import Progress, silent
from pdtrim.stage.cache import LayerCache
from pdtrim.stage.cost import Lengths, stage_flops
from pdtrim.stage.generate import decode_tokens, prefill

SHARES = (0.0, 0.25, 1 / 3, 0.5)
WARM = 2
"""Runs before a capture, in which libraries find their kernels and workspaces."""


@torch.inference_mode()
def bench_stages(
    shape: str,
    *,
    tokens: int,
    shares: Sequence[float] = SHARES,
    dtype: str = "bfloat16",
    device: str = "cpu",
    repeats: int = 5,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Time both stages of a shape in interleaved rounds behind one that warms up.

    Args:
        shape: a name in ``SHAPES``, or a folder with a ``config.json``.
        tokens: of the prompt; decode runs one token behind so many.
        shares: of the blocks that a stage loses; the rows' ratios are over share 0.

    Returns:
        What was timed on what, and ``rows``: for each share and stage its seconds, and ``faster``,
        the time of share 0 in the same round over its own, beside ``flops_faster``, the same
        quotient of the operations that are left.

    Raises:
        PdtrimError: a shape, a device or a number that cannot be timed.
    """
    if dtype not in DTYPES:
        raise PdtrimError(f"unknown dtype '{dtype}': use one of {', '.join(DTYPES)}")
    if tokens < 1 or repeats < 1 or not all(0 <= share < 1 for share in shares):
        raise PdtrimError("tokens and repeats from 1 on, and shares from 0 up to below 1")
    config, place = shape_config(shape), device_of(device)
    with progress("drawing the weights", 1):
        model = random_model(config, dtype=DTYPES[dtype], device=place, name=shape)
    L = model.num_layers
    removed = sorted({round(share * L) for share in (0.0, *shares)})
    windows = any(block is not None and block.window is not None for block in model.blocks)
    captured = place.type == "cuda" and not windows
    lane = Lane(place)
    runs: dict[tuple[str, int], Callable[[], object]] = {}
    for count in removed:
        gates = removing(L, count)
        runs["prefill", count] = _prefill(model, gates[0], tokens)
        runs["decode", count] = _decode(model, gates[1], tokens, max(repeats, WARM) + 1)
    if captured:
        runs = {name: _captured(run, lane) for name, run in runs.items()}
    times = _rounds(runs, lane, place, repeats, progress)
    flops = {count: _flops(model, count, tokens) for count in removed}
    return {
        "shape": shape,
        "tokens": tokens,
        "layers": L,
        "dtype": dtype,
        "device": str(place),
        "hardware": torch.cuda.get_device_name(place) if place.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "code": "captured in a CUDA graph" if captured else "launched from Python",
        "repeats": repeats,
        "rows": [
            _row(stage, count, times, [flops[c][i] for c in (0, count)], L)
            for i, stage in enumerate(("prefill", "decode"))
            for count in removed
        ],
    }


def removing(num_layers: int, count: int) -> tuple[Gates, Gates]:
    """Gates without blocks of prefill, and without blocks of decode, spread evenly."""
    gone = {(2 * i + 1) * num_layers // (2 * count) for i in range(count)}
    # the last block's work is dead in prefill anyway: removing it would save nothing
    early = {(2 * i + 1) * (num_layers - 1) // (2 * count) for i in range(count)}
    return (
        Gates.removing(num_layers, prefill=early).without_dead_work(),
        Gates.removing(num_layers, prefill=gone, decode=gone),
    )


def _prefill(model: Model, gates: Gates, tokens: int) -> Callable[[], object]:
    ids_1N = torch.zeros(1, tokens, dtype=torch.long, device=model.device)

    def run() -> None:
        for _ in prefill(model, ids_1N, gates):
            pass

    return run


def _decode(model: Model, gates: Gates, tokens: int, runs: int) -> Callable[[], object]:
    """One token behind a cache of random pairs, which holds the tokens of so many runs."""
    G, D = model.num_kv_heads, model.head_dim
    drawn = torch.Generator(model.device).manual_seed(0)
    options: Any = {"dtype": model.dtype, "device": model.device, "generator": drawn}
    k, v = torch.randn(2, 1, G, tokens, D, **options)
    at_N = torch.arange(tokens, device=model.device)
    group = HeadGroup(
        heads=tuple(range(G)), k_BgMD=k, v_BgMD=v, positions_BgM=at_N.expand(1, G, tokens)
    )
    caches = {
        layer: LayerCache([group], capacity=runs, window=model.block(layer).window)
        for layer in range(gates.num_layers)
        if gates.decode_attention[layer]
    }
    ids_11 = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    positions_11 = torch.full_like(ids_11, tokens)

    def run() -> torch.Tensor:
        y_11E = decode_tokens(model, gates, caches, ids_11, positions_11)
        return model.network.lm_head(model.network.model.norm(y_11E)).argmax(-1)

    return run


def _captured(run: Callable[[], object], lane: Lane) -> Callable[[], object]:
    """The same work, launched as one graph."""
    with lane.work():
        for _ in range(WARM):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # on a stream of its own, of the lane's device
            run()
    return graph.replay


def _rounds(
    runs: dict[tuple[str, int], Callable[[], object]],
    lane: Lane,
    device: torch.device,
    repeats: int,
    progress: Progress,
) -> dict[tuple[str, int], list[float]]:
    """Seconds of each run in each round."""
    times: dict[tuple[str, int], list[float]] = {name: [] for name in runs}
    with progress("timing the stages", (repeats + 1) * len(runs)) as advance:
        for repeat in range(repeats + 1):  # the first round warms up
            for name, run in runs.items():
                finish(device)
                with lane.work():
                    start = lane.mark()
                    run()
                    stop = lane.mark()
                finish(device)
                if repeat:
                    times[name].append(seconds(start, stop))
                advance(1)
    return times


def _flops(model: Model, count: int, tokens: int) -> tuple[float, float]:
    """Operations of prefill and of one decoded token, each without so many blocks."""
    lengths = Lengths(prompt=tokens + 1, continuation=1)
    policy = HandoverPolicy.full(model.num_layers)
    prefill_gates, decode_gates = removing(model.num_layers, count)
    return (
        stage_flops(model.config, prefill_gates, policy, lengths)[0],
        stage_flops(model.config, decode_gates, policy, lengths)[1],
    )


def _row(
    stage: str,
    count: int,
    times: dict[tuple[str, int], list[float]],
    flops: Sequence[float],
    layers: int,
) -> dict[str, Any]:
    dense, own = times[stage, 0], times[stage, count]
    return {
        "stage": stage,
        "removed": count,
        "share": count / layers,
        "seconds": spread(own),
        "faster": spread([whole / mine for whole, mine in zip(dense, own, strict=True)]),
        "flops_faster": flops[0] / flops[1],
        "flops_removed": 1 - flops[1] / flops[0],
    }
