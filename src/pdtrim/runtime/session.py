"""A session: starts the two stage processes of an exported pair and routes requests through them.

Each prompt goes to prefill without its last token; prefill ships the pruned KV cache to decode over
a socket pair that the session makes and only these two hold; decode runs the last prompt token and
generates. Everything that a caller gives is checked here, before a process hears of it.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from pdtrim.calibration.tokens import encode
from pdtrim.errors import PdtrimError
from pdtrim.exported import check_pair, longest_of, read_pair
from pdtrim.models.tokenizers import chat_text, load_tokenizer
from pdtrim.plan import STAGES
from pdtrim.reading.text import clean
from pdtrim.runtime import checks
from pdtrim.runtime.config import RuntimeConfig, Way
from pdtrim.runtime.control import Message
from pdtrim.runtime.process import Patience, StageProcess
from pdtrim.stage.forward import Batch
from pdtrim.stage.sampling import Sampling


@dataclass(kw_only=True)
class Generation:
    """What one prompt led to.

    Attributes:
        tokens: generated ids, the stop token included if one was met.
        kv_bytes: bytes of its handover that crossed, over the socket and by NIXL.
        transport: how it went.
        exposed_handover: seconds from the end of prefill's last layer to the moment in which
            decode could run; the same for all prompts of a batch.
        stopped: whether a stop token ended it.
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    prompt_tokens: int = 0
    kv_bytes: int = 0
    exposed_handover: float = 0.0
    stopped: bool = False
    transport: Way = "socket"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds and bytes of the last batch.

    Attributes:
        handover_s: from the end of prefill's last layer to decode's word that all has come.
        exposed_handover: from there to the moment in which decode could run.
        transport: by which keys and values travelled.
    """

    prefill_s: float
    handover_s: float
    exposed_handover: float
    decode_s: float
    cache_bytes: int
    transport: Way


class Session:
    """An exported pair at work. Use it as a context manager.

    Whatever exception ends a request, the next one starts afresh: the stages are told to leave the
    work, and what they still say of it is dropped.

    Args:
        folder: holds ``prefill`` and ``decode``.
        config: where the stages run, and the transport.
        patience: how long to wait for a process that does not answer.
        overlap: hand over each layer while prefill computes the next ones; else all of them behind
            the last one, to compare with.

    Raises:
        ModelError: no such checkpoints.
        PlanError: the two come from different plans.
        RuntimeFailure: a process did not start.
    """

    def __init__(
        self,
        folder: str | Path,
        config: RuntimeConfig | None = None,
        *,
        patience: Patience | None = None,
        overlap: bool = True,
    ) -> None:
        placed = RuntimeConfig() if config is None else config
        folder = Path(folder)
        configs, self.plan = read_pair(folder)
        self.max_tokens = longest_of(configs["decode"])
        self.vocab_size = int(configs["decode"]["vocab_size"])
        self.folder = folder
        self.overlap = overlap
        self.way = placed.way
        self.timing: Timing | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._linked = False
        self._requests = 0
        self._stages: list[StageProcess] = []
        # a session that nobody closes ends with its last reference
        self._end = weakref.finalize(self, _close, self._stages)
        try:
            for stage, device in zip(STAGES, placed.devices, strict=True):
                self._stages.append(
                    StageProcess(stage, folder / stage, patience or Patience(), device)
                )
            self.prefill, self.decode = self._stages
            self.prefill.others, self.decode.others = [self.decode], [self.prefill]
            check_pair(*(stage.event(0)["digest"] for stage in self._stages))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End both processes, whatever they do."""
        self._end()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The pair's tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.folder / "decode")
        if self._tokenizer is None:
            raise PdtrimError(f"{self.folder} has no tokenizer: give token ids")
        return self._tokenizer

    @property
    def stop_ids(self) -> list[int]:
        """The model's own end tokens."""
        if not (self.folder / "decode" / "generation_config.json").is_file():
            return []
        end = GenerationConfig.from_pretrained(self.folder / "decode").eos_token_id
        return [] if end is None else [end] if isinstance(end, int) else list(end)

    def encode(self, prompt: str, *, chat: bool | None = None) -> list[int]:
        """Token ids of a prompt.

        Args:
            chat: put it into the model's chat template; None does so if there is one.
        """
        if chat is None:
            chat = self.tokenizer.chat_template is not None
        if not chat:
            return encode(self.tokenizer, prompt, self.vocab_size, special=True)
        text = chat_text(self.tokenizer, clean(prompt))
        return encode(self.tokenizer, text, self.vocab_size)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop_ids: Sequence[int] | None = None,
        chat: bool | None = None,
    ) -> list[Generation]:
        """Generate for a batch of prompts, texts or token ids, of any lengths.

        Raises:
            PdtrimError: an empty or over-long prompt, or an unknown token id.
            RuntimeFailure: a stage refused or ended.
        """
        given = checks.listed(prompts, "prompts")
        tokens = [self.encode(p, chat=chat) if isinstance(p, str) else p for p in given]
        rows = self._check(tokens, max_new_tokens)
        stops = self._stops(stop_ids)
        results = [Generation(prompt_tokens=len(row)) for row in rows]
        for row, token in self.stream(
            rows, max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=stops
        ):
            results[row].tokens.append(token)
        assert self.timing is not None
        for result, size in zip(results, self.kv_bytes, strict=True):
            result.kv_bytes = size
            result.exposed_handover = self.timing.exposed_handover
            result.transport = self.timing.transport
            result.stopped = bool(result.tokens) and result.tokens[-1] in stops
            if any(isinstance(p, str) for p in given):
                result.text = str(self.tokenizer.decode(result.tokens, skip_special_tokens=True))
        return results

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop_ids: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, int]]:
        """Yield (prompt's index, token id) as tokens come. Arguments as in :meth:`generate`.

        Another request ends a stream that has not been read to its end.
        """
        rows = self._check(prompts, max_new_tokens)
        order = {
            "max_new_tokens": int(max_new_tokens),
            "sampling": checks.sampling_fields(sampling),
            "stop": self._stops(stop_ids),
        }
        return self._stream(rows, order)

    def _stream(self, rows: list[list[int]], order: Message) -> Iterator[tuple[int, int]]:
        with self._request():
            requests = self._prefill(rows)
            number = self.decode.order("generate", requests=requests, **order)
            while (event := self.decode.event(number))["event"] == "tokens":
                yield from zip(event["rows"], event["ids"], strict=True)
        self.kv_bytes: list[int] = event["bytes"]
        self.timing = Timing(
            prefill_s=self._prefilled["prefill_s"],
            handover_s=self._prefilled["handover_s"],
            exposed_handover=event["ready_at"] - self._prefilled["computed_at"],
            decode_s=event["decode_s"],
            cache_bytes=event["cache_bytes"],
            transport=self._prefilled["transport"],
        )

    def score(self, batch: Batch) -> Tensor:
        """Logits ``[B, C, V]`` (fp32) of a batch's continuations, through both processes.

        Raises:
            PdtrimError: an empty or over-long sequence, or an unknown token id.
            RuntimeFailure: a stage refused or ended.
        """
        rows = self._check(batch.prompt_BP.tolist(), batch.continuation_BC.shape[1])
        continuation = [
            checks.token_ids(row, self.vocab_size) for row in batch.continuation_BC.tolist()
        ]
        with self._request(), tempfile.TemporaryDirectory(prefix="pdtrim-") as folder:
            requests = self._prefill(rows)
            file = str(Path(folder) / "logits.safetensors")
            number = self.decode.order(
                "score", requests=requests, continuation=continuation, file=file
            )
            self.kv_bytes = self.decode.event(number)["bytes"]
            return load_file(file)["logits"]

    @contextlib.contextmanager
    def _request(self) -> Iterator[None]:
        """Have both stages leave a request that any exception ends, unless a later one did."""
        if not self._stages:
            raise PdtrimError("the session is closed: start another one")
        self._requests += 1
        own = self._requests
        try:
            yield
        except BaseException:
            if own == self._requests:
                for stage in self._stages:
                    stage.order("rest")
            raise

    def _prefill(self, rows: list[list[int]]) -> list[Message]:
        """Run prompts through prefill and the handover; returns decode's view of the requests."""
        requests: list[Message] = [
            {"id": secrets.token_hex(16), "tokens": len(row) - 1, "last": row[-1]} for row in rows
        ]
        prompts = [
            {"id": request["id"], "tokens": row[:-1]}
            for request, row in zip(requests, rows, strict=True)
        ]
        if not self._linked:
            for stage, end in zip(self._stages, self._link(), strict=True):
                stage.event(stage.order("link", give=end, transport=self.way))
        self._linked = False  # until all frames are through: there may be half a one on it
        self.decode.event(self.decode.order("expect", requests=requests))
        self._prefilled = self.prefill.event(
            self.prefill.order("prefill", requests=prompts, overlap=self.overlap)
        )
        self._linked = True
        return requests

    def _link(self) -> tuple[socket.socket, socket.socket]:
        """Prefill's and decode's end of a new stream."""
        return socket.socketpair()

    def _stops(self, stop_ids: Sequence[int] | None) -> list[int]:
        given = self.stop_ids if stop_ids is None else stop_ids
        return [checks.whole(i, "stop id") for i in checks.listed(given, "stop_ids")]

    def _check(self, prompts: object, max_new_tokens: object) -> list[list[int]]:
        """The prompts' token ids, all of the vocabulary, none too many."""
        new_tokens = checks.whole(max_new_tokens, "max_new_tokens")
        if new_tokens < 1:
            raise PdtrimError(f"max_new_tokens {checks.shown(new_tokens)} must be at least 1")
        rows = [
            checks.token_ids(prompt, self.vocab_size)
            for prompt in checks.listed(prompts, "prompts")
        ]
        if not rows:
            raise PdtrimError("no prompt given")
        for row in rows:
            if not row:
                raise PdtrimError("the prompt is empty: give at least one token")
            if len(row) + new_tokens > self.max_tokens:
                raise PdtrimError(
                    f"{len(row)} prompt tokens and {checks.shown(new_tokens)} new ones pass the"
                    f" model's limit of {self.max_tokens}"
                )
        return rows


def _close(stages: list[StageProcess]) -> None:
    for stage in stages:
        stage.end()
    while stages:
        stages.pop().close()
