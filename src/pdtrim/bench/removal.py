"""Seconds of prefill and of a decoded token against blocks removed, on random weights of a shape.

Prefill loses blocks as in mode ``projected``: they still make keys and values. Decode loses whole
blocks. Where the stage runs on a GPU its work is captured once and replayed, as an engine does, so
that launches from Python do not hide what fewer blocks save. Blocks with a sliding window are not
captured, because what they read depends on the position.

Shapes: N prompt tokens, L layers, G KV heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from pdtrim.bench.configs import StagesConfig
from pdtrim.bench.lanes import Lane, facts_of, spread, timed_rounds
from pdtrim.bench.shapes import random_model, shape_config
from pdtrim.devices import device_of
from pdtrim.errors import PdtrimError
from pdtrim.kv.groups import HeadGroup
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.models.loading import dtype_named
from pdtrim.models.model import Model
from pdtrim.plan import STAGES, Gates
from pdtrim.progress import Progress, silent
from pdtrim.stage.cache import LayerCache
from pdtrim.stage.cost import Lengths, stage_flops
from pdtrim.stage.generate import decode_tokens, run_prefill

WARM = 2
"""Runs before a capture, in which libraries find their kernels and workspaces."""


@torch.inference_mode()
def bench_stages(
    shape: str,
    config: StagesConfig = StagesConfig(),
    *,
    dtype: str = "bfloat16",
    device: str = "cpu",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Time both stages of a shape in interleaved rounds behind one that warms up.

    Args:
        shape: a name in ``SHAPES``, or a folder with a ``config.json``.

    Returns:
        What was timed on what, and ``rows``: for each share and stage its seconds, and ``faster``,
        the time of share 0 in the same round over its own, beside ``flops_faster``, the same
        quotient of the operations that are left.

    Raises:
        PdtrimError: a shape, a device or a number that cannot be timed.
    """
    tokens, repeats, kind = config.tokens, config.repeats, dtype_named(dtype)
    if tokens < 1 or repeats < 1 or not all(0 <= share < 1 for share in config.shares):
        raise PdtrimError("tokens and repeats from 1 on, and shares from 0 up to below 1")
    of_shape, place = shape_config(shape), device_of(device)
    with progress("drawing the weights", 1):
        model = random_model(of_shape, dtype=kind, device=place, name=shape)
    L = model.num_layers
    removed = sorted({round(share * L) for share in (0.0, *config.shares)})
    windows = any(block is not None and block.window is not None for block in model.blocks)
    captured = place.type == "cuda" and not windows
    lane = Lane(place)
    runs = _runs(model, removed, tokens, max(repeats, WARM) + 1)
    if captured:
        runs = {name: _captured(run, lane) for name, run in runs.items()}
    with progress("timing the stages", (repeats + 1) * len(runs)) as advance:
        times = timed_rounds(runs, lane, repeats, advance)
    return {
        "shape": shape,
        "tokens": tokens,
        "layers": L,
        "dtype": dtype,
        **facts_of(place),
        "code": "captured in a CUDA graph" if captured else "launched from Python",
        "repeats": repeats,
        "rows": _rows(model, removed, tokens, times),
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


def _runs(
    model: Model, removed: Sequence[int], tokens: int, times: int
) -> dict[tuple[str, int], Callable[[], object]]:
    """What each stage does without so many blocks; decode's caches have room for so many times."""
    runs: dict[tuple[str, int], Callable[[], object]] = {}
    ids_1N = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
    for count in removed:
        prefill_gates, decode_gates = removing(model.num_layers, count)
        runs["prefill", count] = partial(run_prefill, model, ids_1N, prefill_gates)
        runs["decode", count] = _decode(model, decode_gates, tokens, times)
    return runs


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


def _flops(model: Model, count: int, tokens: int) -> tuple[float, float]:
    """Operations of prefill and of one decoded token, each without so many blocks."""
    lengths = Lengths(prompt=tokens + 1, continuation=1)
    policy = HandoverPolicy.full(model.num_layers)
    prefill_gates, decode_gates = removing(model.num_layers, count)
    return (
        stage_flops(model.config, prefill_gates, policy, lengths)[0],
        stage_flops(model.config, decode_gates, policy, lengths)[1],
    )


def _rows(
    model: Model,
    removed: Sequence[int],
    tokens: int,
    times: dict[tuple[str, int], list[float]],
) -> list[dict[str, Any]]:
    """A row for each stage and count, the first of which removes nothing."""
    flops = {count: _flops(model, count, tokens) for count in removed}
    rows = []
    for of_stage, stage in enumerate(STAGES):
        dense = times[stage, 0]
        for count in removed:
            own = times[stage, count]
            whole, left = flops[0][of_stage], flops[count][of_stage]
            rows.append(
                {
                    "stage": stage,
                    "removed": count,
                    "share": count / model.num_layers,
                    "seconds": spread(own),
                    "faster": spread([a / b for a, b in zip(dense, own, strict=True)]),
                    "flops_faster": whole / left,
                    "flops_removed": 1 - left / whole,
                }
            )
    return rows
