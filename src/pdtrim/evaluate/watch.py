"""Served requests, replayed by the hour: what the pair costs on them, beside what was expected.

A seeded hash of each request decides whether it is replayed, so that the same log is sampled alike
whenever it is read. A replayed request goes through the dense model and through the pair, teacher
forced: its answer is the continuation, or the end of its prompt where the log has no answer.
Longer prompts than the limit are left out and counted, and not cut, which would make other
text of them.

Hours are those of the log, in UTC; a request without a time counts for the moment it is read. An
hour ends when a request of a later one comes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from pdtrim.bundle import TrimPlan
from pdtrim.calibration.tokens import check_ids, encode
from pdtrim.errors import CalibrationError
from pdtrim.evaluate.drift import LEAST, p_value
from pdtrim.evaluate.handover import loopback_bytes
from pdtrim.evaluate.quality import measure_quality
from pdtrim.models.model import Model
from pdtrim.reading.requests import Request, Words
from pdtrim.stage.forward import Batch, Trimmed

HOUR_S = 3600
WIRE_REQUESTS = 4
"""Requests of an hour whose handover is encoded to count its bytes."""
SKIPPED = ("unreadable", "short", "long", "foreign", "over the hour's limit")
"""Why a request of the sample is not replayed. Foreign: not of the model's vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What the plan's pair costs on text that it was judged on.

    Attributes:
        kl: nats a token.
        kls: of each sequence; empty where they were not kept, so that drift cannot be tested.
    """

    kl: float
    kls: tuple[float, ...] = ()
    source: str

    @classmethod
    def of(cls, trim: TrimPlan) -> Expected | None:
        """From the plan's own provenance; None if it has none."""
        held_out = trim.plan.provenance.held_out
        if held_out is None:
            return None
        return cls(kl=held_out.kl, kls=held_out.kls, source="the plan's held-out text")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Which requests are replayed.

    Attributes:
        share: of all requests.
        per_hour: replayed at most; the first of the sample are.
        prompt_tokens: of the longest prompt.
        answer_tokens: of an answer that are compared, from its first; of a prompt without one, its
            last, half of it at most.
    """

    share: float
    seed: int
    per_hour: int
    prompt_tokens: int
    answer_tokens: int

    def picks(self, request: Request) -> bool:
        """Whether a request is of the sample, the same whenever it is asked."""
        made = hashlib.sha256(b"%d:%b" % (self.seed, request.key)).digest()
        return int.from_bytes(made[:8], "big") < self.share * 2**64


@dataclass(frozen=True, kw_only=True)
class Hour:
    """What an hour's replayed requests cost.

    Attributes:
        start: seconds since 1970.
        kls: KL(dense || pair) of each request, nats a token, in the log's order.
        agreement: mean share of tokens whose likeliest one is the dense model's.
        kv_bytes_per_token: that cross the wire for a token of a prompt; None without a prompt of 2.
        p: of the drift test; None where it was not made.
        drift: whether p says that a new plan is called for.
    """

    start: int
    kls: tuple[float, ...]
    agreement: float
    kv_bytes_per_token: float | None
    p: float | None = None
    drift: bool | None = None

    @property
    def kl(self) -> float:
        """Mean."""
        return float(np.mean(self.kls))

    @property
    def kl_error(self) -> float:
        """Standard error; 0 for a single request."""
        n = len(self.kls)
        return float(np.std(self.kls, ddof=1) / np.sqrt(n)) if n > 1 else 0.0


@dataclass
class _Open:
    """An hour that has not ended."""

    start: int
    kls: list[float] = field(default_factory=list)
    same: list[float] = field(default_factory=list)
    sent: float = 0.0
    sent_tokens: int = 0
    wired: int = 0


class Watch:
    """Takes requests one by one and gives the hours that end.

    Args:
        model: the plan's dense model.
        expected: None if nothing is known; then drift is not tested.
        worse, false_alarms: of the drift test, as in ``evaluate/drift.py``.

    Attributes:
        requests, replayed: that came, and that were measured.
        skipped: those of the sample that were not, by reason.
    """

    def __init__(
        self,
        trim: TrimPlan,
        model: Model,
        sampling: Sample,
        expected: Expected | None,
        *,
        worse: float,
        false_alarms: float,
    ) -> None:
        self.model, self.plan, self.pair = model, trim.plan, trim.pair(model)
        self.sampling, self.expected = sampling, expected
        self.worse, self.false_alarms = worse, false_alarms
        self.trimmed = Trimmed.of(trim.plan, self.pair)
        self.requests = self.replayed = 0
        self.skipped: Counter[str] = Counter(dict.fromkeys(SKIPPED, 0))
        self._hour: _Open | None = None

    def take(self, request: Request | None, now: float) -> Iterator[Hour]:
        """Replay a request if it is of the sample.

        Args:
            request: None for a line that is none.
            now: seconds since 1970, for a request without a time.

        Yields:
            The hour before, if this request is of a later one.

        Raises:
            PdtrimError: a KL is NaN or infinite.
        """
        if request is None:
            self.skipped["unreadable"] += 1
            return
        self.requests += 1
        moment = now if request.time is None else request.time
        start = int(moment // HOUR_S) * HOUR_S
        if self._hour is None or start > self._hour.start:
            if (ended := self.end()) is not None:
                yield ended
            self._hour = _Open(start)
        if not self.sampling.picks(request):
            return
        batch = self._batch(request)
        if isinstance(batch, str):
            self.skipped[batch] += 1
        elif len(self._hour.kls) >= self.sampling.per_hour:
            self.skipped["over the hour's limit"] += 1
        else:
            self._replay(batch, self._hour)

    def end(self) -> Hour | None:
        """The hour that is open, as if it ended now; None if nothing of it was replayed."""
        hour, self._hour = self._hour, None
        if hour is None or not hour.kls:
            return None
        p = self._p(hour)
        return Hour(
            start=hour.start,
            kls=tuple(hour.kls),
            agreement=float(np.mean(hour.same)),
            kv_bytes_per_token=hour.sent / hour.sent_tokens if hour.sent_tokens else None,
            p=p,
            drift=None if p is None else p <= self.false_alarms,
        )

    def _p(self, hour: _Open) -> float | None:
        if self.expected is None or len(self.expected.kls) < 2 or len(hour.kls) < LEAST:
            return None
        reference = np.array(self.expected.kls)
        return p_value(np.array(hour.kls), reference, worse=self.worse, seed=hour.start)

    def _replay(self, batch: Batch, hour: _Open) -> None:
        found = measure_quality(self.model, {"the pair": self.trimmed}, batch)["the pair"]
        assert found.same_n is not None
        hour.kls.append(found.kl)
        hour.same.append(float(found.same_n[0]))
        tokens = batch.prompt_BP.shape[1]
        if hour.wired < WIRE_REQUESTS and tokens > 1:
            hour.wired += 1
            hour.sent += loopback_bytes(self.plan, self.pair.prefill, batch).frame
            hour.sent_tokens += tokens
        self.replayed += 1

    def _batch(self, request: Request) -> Batch | str:
        """The request as prompt and continuation, or why it cannot be."""
        limit = self.sampling.answer_tokens
        try:
            prompt = self._ids(request.prompt, special=True)
            if request.answer is None:
                cut = max(len(prompt) // 2, len(prompt) - limit)
                prompt, answer = prompt[:cut], prompt[cut:]
            else:
                answer = self._ids(request.answer, special=False)[:limit]
        except CalibrationError:
            return "foreign"
        if not prompt or not answer:
            return "short"
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if len(prompt) > self.sampling.prompt_tokens or (
            longest is not None and len(prompt) + len(answer) > int(longest)
        ):
            return "long"
        return Batch.cut(torch.tensor([[*prompt, *answer]]), len(prompt))

    def _ids(self, words: Words, *, special: bool) -> list[int]:
        vocabulary = int(self.model.config.vocab_size)
        if isinstance(words, str):
            return encode(self.model.need_tokenizer(), words, vocabulary, special=special)
        check_ids(words, vocabulary)
        return list(words)
