"""The simulator's speed against transformers' own forward, and what prefix reuse saves."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from pdtrim.bench.configs import ForwardConfig
from pdtrim.bench.lanes import Lane, timed_rounds
from pdtrim.errors import PdtrimError
from pdtrim.models.model import Model
from pdtrim.progress import Progress, silent
from pdtrim.stage.forward import Batch, Trimmed


@torch.inference_mode()
def bench_forward(
    model: Model,
    config: ForwardConfig = ForwardConfig(),
    *,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Median times over interleaved runs, the same batch and the same logits for both.

    Both compute logits of the continuation only. Token rates count prompt and continuation.

    Args:
        model: runs where it is loaded.

    Returns:
        Tokens a second of both, ``ratio``, the simulator's over transformers', and ``reuse``: for
        each depth to resume at, the share of the full time beside the share of the blocks.

    Raises:
        PdtrimError: a number below 1.
    """
    prompt, continuation, rows = config.prompt_tokens, config.continuation_tokens, config.rows
    if min(prompt, continuation, rows, config.repeats) < 1:
        raise PdtrimError("prompt tokens, continuation tokens, rows, repeats: at least one of each")
    generator = torch.Generator().manual_seed(0)
    shape = (rows, prompt + continuation)
    ids = torch.randint(0, model.config.vocab_size, shape, generator=generator).to(model.device)
    batch = Batch.cut(ids, prompt)
    dense = Trimmed.dense(model)
    trace = dense.streams(batch)
    starts = [model.num_layers * i // 4 for i in (1, 2, 3)]
    runs: dict[str, Callable[[], object]] = {
        "transformers": lambda: model.network(ids[:, :-1], logits_to_keep=continuation),
        "simulator": lambda: dense.pair.decode.head(dense.last_stream(batch)),
        "blocks": lambda: dense.streams(batch),
    }
    for start in starts:
        runs[f"resume {start}"] = lambda start=start: dense.streams(  # type: ignore[misc]
            batch, resume=trace, start=start
        )
    with progress("timing", (config.repeats + 1) * len(runs)) as advance:
        times = timed_rounds(runs, Lane(model.device), config.repeats, advance)
    median = {name: statistics.median(values) for name, values in times.items()}
    tokens = rows * (prompt + continuation - 1)
    return {
        "transformers_tokens_s": tokens / median["transformers"],
        "simulator_tokens_s": tokens / median["simulator"],
        "ratio": median["transformers"] / median["simulator"],
        "reuse": [
            {
                "start": start,
                "time_share": median[f"resume {start}"] / median["blocks"],
                "block_share": 1 - start / model.num_layers,
            }
            for start in starts
        ],
        "dtype": model.dtype_name,
        "threads": torch.get_num_threads(),
    }
