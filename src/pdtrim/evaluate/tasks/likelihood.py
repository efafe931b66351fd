"""Log-likelihood of continuations under prefill/decode inference, many at once.

The context without its last token is prefilled; that token and the continuation run in decode on
what was handed over. Contexts are prefilled once whatever number of continuations they have, and
continuations that differ in their last token alone share a row of decode, as the four letters of a
multiple choice question do. Each score equals the simulator's (``stage/forward.py``) to rounding.

Shapes: R rows of decode, C tokens of the longest row, A predicted positions of all rows, J scored
tokens, V vocabulary, E hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from pdtrim.calibration.teacher import head_rows
from pdtrim.evaluate.tasks.ragged import DecodeRows, Prompts, decode_rows, padded
from pdtrim.models.model import Model
from pdtrim.progress import Progress, silent
from pdtrim.stage.forward import Trimmed

CPU_TOKENS = 1024  # tokens that run together on a CPU: larger batches leave the caches


@dataclass(frozen=True, kw_only=True)
class Query:
    """A continuation to score behind a context, token ids; neither may be empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Of a continuation: its log-probability in nats, and whether greedy decoding would say it."""

    total: float
    greedy: bool


@dataclass(frozen=True, kw_only=True)
class _Context:
    """A context and its queries, by what decode reads of them behind the context's last token."""

    ids: tuple[int, ...]
    queries: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        return 1 + max(len(read) for read in self.queries)


def score(
    trimmed: Trimmed,
    queries: Sequence[Query],
    *,
    batch_tokens: int,
    progress: Progress = silent,
) -> list[Likelihood]:
    """The likelihood of every query, in their order.

    Args:
        batch_tokens: tokens, padding included, of both stages that run together; a context with
            its continuations is never split. A CPU takes at most ``CPU_TOKENS``.
    """
    if trimmed.pair.decode.device.type == "cpu":
        batch_tokens = min(batch_tokens, CPU_TOKENS)
    found: dict[int, Likelihood] = {}
    with progress("scoring", len(queries)) as advance:
        for batch in _batches(_contexts(queries), batch_tokens):
            part = _score_batch(trimmed, batch, queries)
            found.update(part)
            advance(len(part))
    return [found[i] for i in range(len(queries))]


def _contexts(queries: Sequence[Query]) -> list[_Context]:
    contexts: dict[tuple[int, ...], _Context] = {}
    for i, query in enumerate(queries):
        assert query.context and query.continuation
        context = contexts.setdefault(query.context, _Context(ids=query.context))
        context.queries.setdefault(query.continuation[:-1], []).append(i)
    return list(contexts.values())


def _batches(contexts: list[_Context], budget: int) -> Iterator[list[_Context]]:
    """Contexts of about equal lengths together, the longest first."""
    batch: list[_Context] = []
    rows = longest = 0
    for context in sorted(contexts, key=lambda c: (len(c.ids), c.longest), reverse=True):
        more_rows, more_longest = rows + len(context.queries), max(longest, context.longest)
        prefilled = (len(batch) + 1) * len((batch or [context])[0].ids)
        if batch and prefilled + more_rows * more_longest > budget:
            yield batch
            batch, more_rows, more_longest = [], len(context.queries), context.longest
        batch.append(context)
        rows, longest = more_rows, more_longest
    if batch:
        yield batch


def _score_batch(
    trimmed: Trimmed, batch: list[_Context], queries: Sequence[Query]
) -> dict[int, Likelihood]:
    device = trimmed.pair.decode.device
    rows = [
        (owner, (context.ids[-1], *read), answered)
        for owner, context in enumerate(batch)
        for read, answered in context.queries.items()
    ]
    y_RCE = decode_rows(
        trimmed,
        Prompts.of([context.ids for context in batch], device),
        DecodeRows(
            ids_RC=padded([read for _, read, _ in rows], device),
            starts_R=torch.tensor([len(batch[o].ids) - 1 for o, _, _ in rows], device=device),
            prompt_R=None
            if len(rows) == len(batch)
            else torch.tensor([owner for owner, _, _ in rows], device=device),
        ),
    )
    lengths = [len(read) for _, read, _ in rows]
    real_RC = torch.arange(y_RCE.shape[1]) < torch.tensor(lengths)[:, None]
    firsts = accumulate(lengths, initial=0)
    # one entry a scored token: the position that predicts it, the token, its query
    entries = [
        (first + t, token, i)
        for first, (_, _, answered) in zip(firsts, rows, strict=False)
        for i in answered
        for t, token in enumerate(queries[i].continuation)
    ]
    at_J, token_J, query_J = torch.tensor(sorted(entries)).T.contiguous()
    logp_J, hit_J = _predict(trimmed.pair.decode, y_RCE[real_RC.to(device)], at_J, token_J)
    total = torch.zeros(len(queries), dtype=torch.float64).index_add_(0, query_J, logp_J)
    misses = torch.zeros(len(queries), dtype=torch.long).index_add_(0, query_J, (~hit_J).long())
    return {
        i: Likelihood(total=float(total[i]), greedy=not misses[i])
        for _, _, answered in rows
        for i in answered
    }


@torch.inference_mode()
def _predict(model: Model, y_AE: Tensor, at_J: Tensor, token_J: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability (fp64) of each scored token, and whether it is the likeliest one; on the CPU.

    Args:
        at_J: which position of ``y_AE`` predicts the token, ascending.
    """
    width = head_rows(y_AE.device)
    logp, hit = [], []
    for start in range(0, len(y_AE), width):
        logits_AV = model.head(y_AE[start : start + width]).float()
        first, stop = torch.searchsorted(at_J, torch.tensor([start, start + width])).tolist()
        at = (at_J[first:stop] - start).to(y_AE.device)
        token = token_J[first:stop].to(y_AE.device)
        logp.append(logits_AV[at, token] - logits_AV.logsumexp(-1)[at])
        hit.append(logits_AV.argmax(-1)[at] == token)
    return torch.cat(logp).double().cpu(), torch.cat(hit).cpu()
