"""Greedy generation for many prompts of unequal lengths, with prefill/decode inference.

Shapes: U prompts of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pdtrim.evaluate.tasks.ragged import Prompts, handed_over
from pdtrim.progress import Progress, silent
from pdtrim.stage.cache import LayerCache
from pdtrim.stage.forward import Trimmed
from pdtrim.stage.generate import generate
from pdtrim.stage.sampler import Sampler
from pdtrim.stage.sampling import Sampling


def generate_greedy(
    trimmed: Trimmed,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    finished: Callable[[list[int]], bool],
    batch_tokens: int,
    progress: Progress = silent,
) -> list[list[int]]:
    """New token ids of each prompt, the one that finished it included.

    Args:
        prompts: token ids, at least one each.
        finished: whether the tokens generated so far end the answer.
        batch_tokens: tokens, padding and room for the answers included, that run together.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    answers: dict[int, list[int]] = {}
    with progress("generating", len(prompts)) as advance:
        while order:
            longest = len(prompts[order[0]]) + max_new_tokens
            rows = max(1, batch_tokens // longest)
            batch, order = order[:rows], order[rows:]
            new = _generate_batch(trimmed, [prompts[i] for i in batch], max_new_tokens, finished)
            answers.update(zip(batch, new, strict=True))
            advance(len(batch))
    return [answers[i] for i in range(len(prompts))]


@torch.inference_mode()
def _generate_batch(
    trimmed: Trimmed,
    prompts: list[Sequence[int]],
    max_new_tokens: int,
    finished: Callable[[list[int]], bool],
) -> list[list[int]]:
    model = trimmed.pair.decode
    padded = Prompts.of(prompts, model.device)
    caches = {
        layer: LayerCache(groups, capacity=max_new_tokens, window=model.block(layer).window)
        for layer, groups in handed_over(trimmed, padded)
    }
    new: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    for ids_U in generate(
        model,
        trimmed.gates,
        caches,
        torch.tensor([prompt[-1] for prompt in prompts], device=model.device),
        torch.tensor(padded.lengths, device=model.device),
        Sampler(Sampling(), len(prompts)),
        max_new_tokens=max_new_tokens,
    ):
        ids = ids_U.tolist()
        for row in tuple(running):
            new[row].append(ids[row])
            if finished(new[row]):
                running.remove(row)
        if not running:
            break
    return new
