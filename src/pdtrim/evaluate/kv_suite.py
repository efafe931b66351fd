"""Retrieval under KV policies: what decode still finds in the cache that it was handed.

Each probe runs in two ways. *Visible*: the question is part of the prompt, so a selector can look
for what the question needs. *Hidden*: the prompt ends before the question, as when a prefix is
cached or a conversation goes on, and the selector must keep what any question could need. Decode
reads the same tokens at the same positions in both; only the handover comes earlier.

One-token tasks are blind to the KV cache: where prefill samples the first output token, as serving
engines do, it comes from prefill's full cache, and an answer of one token scores the same whatever
was dropped. (Here decode makes that token too, but the numbers should mean the same elsewhere.)
Every answer must therefore have more than one token, and all of them count.

Shapes: B batch, P prompt tokens, C continuation tokens, A answer tokens, n probes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from pdtrim.calibration.tokens import begin_ids, encode_for
from pdtrim.errors import PdtrimError
from pdtrim.evaluate.retrieval import Probe, generate, tasks
from pdtrim.evaluate.statistics import paired_difference
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.models.model import Model
from pdtrim.plan import Gates
from pdtrim.progress import Progress, silent
from pdtrim.stage.forward import Batch, Trimmed, last_streams

REFERENCE = "full"
VIEWS = ("visible", "hidden")
ROWS = 4  # probes run together

Hits = NDArray[np.int64]
"""One 0 or 1 a probe, ``[n]``."""


@dataclass(frozen=True, kw_only=True)
class KvSuiteConfig:
    """Which probes, and how long."""

    tasks: tuple[str, ...] = ("needle", "multikey", "tracking", "system")
    probes: int = 20  # of each task
    tokens: int = 512  # the most a prompt may have, its question included
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise PdtrimError("a KV suite needs at least one task, and each only once")
        unknown = set(self.tasks) - set(tasks())
        if unknown:
            raise PdtrimError(f"unknown retrieval tasks {sorted(unknown)}: known are {tasks()}")
        if self.probes < 2:
            raise PdtrimError("a KV suite needs at least 2 probes of each task")


class SuiteResult(dict[str, dict[str, float]]):
    """Metrics by policy; a plain dict, with the per-probe arrays beside it.

    Metrics of a policy, ``VIEW`` being ``visible`` or ``hidden``:

    * ``TASK_VIEW``: share of the task's probes answered, 0 to 1; ``retrieval_VIEW``: its mean over
      the tasks.
    * ``retrieval_VIEW_delta``, ``_delta_low``, ``_delta_high``: policy minus ``full`` in points,
      0 to 100, over all probes, with its paired bootstrap interval. Below 0 is a loss.
    * ``kept_at_most``: share of a hidden prompt's pairs that travel, mean over layers; 1 where a
      selector decides anew for each prompt.

    Attributes:
        hits: by policy and ``TASK_VIEW``, one 0 or 1 a probe.
    """

    def __init__(
        self, metrics: Mapping[str, dict[str, float]], hits: Mapping[str, dict[str, Hits]]
    ) -> None:
        super().__init__(metrics)
        self.hits = dict(hits)


@dataclass(frozen=True, kw_only=True)
class _Tokens:
    """A probe in token ids; the continuation's last ``answer`` tokens are scored."""

    prompt: list[int]
    continuation: list[int]
    answer: int

    @property
    def lengths(self) -> tuple[int, int, int]:
        return len(self.prompt), len(self.continuation), self.answer


def _tokens(model: Model, probe: Probe, *, hidden: bool) -> _Tokens:
    # Piece by piece: a merge across a border would make the two views read different tokens.
    context, question, answer = (
        encode_for(model, text) for text in (probe.context, probe.question, probe.answer)
    )
    if len(answer) < 2:
        raise PdtrimError(
            f"the answer '{probe.answer}' is {len(answer)} token of this tokenizer: it needs 2 or"
            " more, as a task of one token is blind to the KV cache"
        )
    prompt = begin_ids(model.need_tokenizer()) + context + ([] if hidden else question)
    if not prompt:
        raise PdtrimError("a probe's prompt is empty: decode starts from its last token")
    continuation = question + answer if hidden else answer
    return _Tokens(prompt=prompt, continuation=continuation, answer=len(answer))


@torch.inference_mode()
def retrieval_scores(
    trimmed: Trimmed,
    policies: Mapping[str, HandoverPolicy],
    probes: Sequence[Probe],
    *,
    hidden: bool,
    progress: Progress = silent,
) -> dict[str, Hits]:
    """Which probes each policy answers: by policy, 0 or 1 a probe ``[n]`` in the given order.

    A hit is an exact match: with the answer fed to decode, the argmax of the logits before each of
    its tokens is that token. Greedy generation says the answer in just these cases. Its first token
    depends on the same inputs; as long as each token so far was the answer's, generation has read
    what was fed here, so the next argmax is the same; and at the first other token both miss.
    (Generation runs one token at a time, so near ties may fall otherwise in bf16.) What would
    follow the answer is not looked at.

    Args:
        trimmed: what runs; its own policy is not asked.
        hidden: hand over before the question, which decode then reads; only the answer is scored.

    Raises:
        PdtrimError: no tokenizer, an answer of fewer than 2 tokens, or an empty prompt.
    """
    decode = trimmed.pair.decode
    encoded = [_tokens(decode, probe, hidden=hidden) for probe in probes]
    alike: dict[tuple[int, int, int], list[int]] = {}
    for i, tokens in enumerate(encoded):
        alike.setdefault(tokens.lengths, []).append(i)
    variants = [replace(trimmed, policy=policy) for policy in policies.values()]
    hits = {name: np.zeros(len(probes), dtype=np.int64) for name in policies}
    what = f"retrieval, question {VIEWS[hidden]}"
    with progress(what, len(probes) * len(policies)) as advance:
        for (_, _, A), members in alike.items():
            for start in range(0, len(members), ROWS):
                rows = members[start : start + ROWS]
                batch = Batch(
                    prompt_BP=torch.tensor([encoded[i].prompt for i in rows]),
                    continuation_BC=torch.tensor([encoded[i].continuation for i in rows]),
                ).to(decode.device)
                for name, y_BCE in zip(policies, last_streams(variants, batch), strict=True):
                    # the head on the answer alone: a question's logits would be most of the memory
                    said_BA = decode.head(y_BCE[:, -A:]).argmax(-1)
                    hit_B = (said_BA == batch.continuation_BC[:, -A:]).all(-1)
                    hits[name][rows] = hit_B.cpu().numpy()
                    advance(len(rows))
    return hits


def run_suite(
    trimmed: Trimmed,
    policies: Mapping[str, HandoverPolicy],
    config: KvSuiteConfig | None = None,
    progress: Progress = silent,
) -> SuiteResult:
    """Every task, question visible and hidden, under every policy and under ``full``.

    The policy ``full``, everything raw, is what the others are compared with; it is added if it is
    not among ``policies``. All run under the same gates and on the same probes.

    Raises:
        PdtrimError: a policy named ``full`` that is not, or as :func:`retrieval_scores`.
    """
    config = config or KvSuiteConfig()
    pair, gates = trimmed.pair, trimmed.gates
    full = replace(HandoverPolicy.full(gates.num_layers), places=trimmed.policy.places)
    if policies.get(REFERENCE, full).rules != full.rules:
        raise PdtrimError(f"the policy named '{REFERENCE}' must keep every pair in every layer raw")
    policies = {REFERENCE: full, **policies}
    begin = len(begin_ids(pair.decode.need_tokenizer()))
    probes = [
        probe
        for task in config.tasks
        for probe in generate(
            task,
            count=config.probes,
            seed=config.seed,
            count_tokens=lambda text: begin + len(encode_for(pair.decode, text)),
            tokens=config.tokens,
        )
    ]
    hits: dict[str, dict[str, Hits]] = {name: {} for name in policies}
    for view in VIEWS:
        found = retrieval_scores(
            trimmed, policies, probes, hidden=view == "hidden", progress=progress
        )
        for name, hits_n in found.items():
            for i, task in enumerate(config.tasks):
                part = hits_n[i * config.probes : (i + 1) * config.probes]
                hits[name][f"{task}_{view}"] = part
    metrics = summarize(hits, seed=config.seed)
    lengths = Counter(len(_tokens(pair.decode, p, hidden=True).prompt) - 1 for p in probes)
    for name, policy in policies.items():
        metrics[name]["kept_at_most"] = _kept(policy, gates, pair.prefill.num_kv_heads, lengths)
    return SuiteResult(metrics, hits)


def summarize(hits: Mapping[str, Mapping[str, Hits]], *, seed: int) -> dict[str, dict[str, float]]:
    """Means and paired differences to ``full``, as :class:`SuiteResult` names them.

    Args:
        hits: by policy and ``TASK_VIEW``; the same probes in the same order for every policy.
        seed: of the bootstrap.
    """
    metrics: dict[str, dict[str, float]] = {}
    for name, own in hits.items():
        row = {key: float(hits_n.mean()) for key, hits_n in own.items()}
        for view in VIEWS:
            keys = [key for key in own if key.endswith(f"_{view}")]
            # over the policy's keys in both: pairing must not hang on the order of a mapping
            a_n, b_n = (np.concatenate([of[key] for key in keys]) for of in (own, hits[REFERENCE]))
            points = paired_difference(100.0 * a_n, 100.0 * b_n, seed=seed)
            metric = f"retrieval_{view}"
            row[metric] = float(np.mean([row[key] for key in keys]))
            row[f"{metric}_delta"] = points.mean
            row[f"{metric}_delta_low"] = points.low
            row[f"{metric}_delta_high"] = points.high
        metrics[name] = row
    return metrics


def _kept(policy: HandoverPolicy, gates: Gates, heads: int, lengths: Counter[int]) -> float:
    layers = [i for i, attends in enumerate(gates.decode_attention) if attends]
    if not layers:
        return 0.0  # nothing is handed over
    total = sum(
        count * policy.share(layer, heads, tokens)
        for tokens, count in lengths.items()
        for layer in layers
    )
    return total / (lengths.total() * len(layers))
