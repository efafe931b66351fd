"""A session: starts the two stage processes of an exported pair and routes requests through them.

Each prompt goes to prefill without its last token; prefill ships the pruned KV cache to decode over
a loopback socket; decode runs the last prompt token and generates.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from pdtrim.errors import PdtrimError, RuntimeFailure
from pdtrim.export import check_pair, read_pair
from pdtrim.models.checkpoint import read_stage_config
from pdtrim.plan import STAGES, PrunePlan, Stage
from pdtrim.stage.forward import Batch
from pdtrim.stage.sampling import Sampling

Message = dict[str, Any]


@dataclass(kw_only=True)
class Generation:
    """What one prompt led to.

    Attributes:
        tokens: generated ids, the stop token included if one was met.
        kv_bytes: bytes of its handover that crossed the socket.
        stopped: whether a stop token ended it.
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    prompt_tokens: int = 0
    kv_bytes: int = 0
    stopped: bool = False


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds and bytes of the last batch."""

    prefill_s: float
    handover_s: float
    decode_s: float
    cache_bytes: int


class StageProcess:
    """One running stage: its orders, its events, its log."""

    def __init__(self, stage: Stage, folder: Path) -> None:
        self.stage = stage
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        # a process group of its own: Ctrl-C reaches the session, which then ends the stages
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"pdtrim.runtime.{stage}", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            start_new_session=True,
            text=True,
            encoding="utf-8",
        )

    def order(self, op: str, **fields: Any) -> None:
        """Ask for something."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"op": op, **fields}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def event(self) -> Message:
        """The next event.

        Raises:
            RuntimeFailure: the stage refused the order, or ended.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise self._ended()
        message: Message = json.loads(line)
        if message["event"] == "error":
            raise RuntimeFailure(f"{self.stage}: {message['message']}")
        return message

    def close(self) -> None:
        """End the process, gently first."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()

    def _ended(self) -> RuntimeFailure:
        code = self.process.wait()
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return RuntimeFailure(
            f"the {self.stage} process ended (exit {code}): {lines[-1] if lines else 'no message'}"
        )


class Session:
    """An exported pair at work. Use it as a context manager.

    Args:
        folder: holds ``prefill`` and ``decode``.

    Raises:
        ModelError: no such checkpoints.
        PlanError: the two come from different plans.
        RuntimeFailure: a process did not start.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        configs, self.plan = read_pair(folder)
        config = configs["decode"]
        self.max_tokens = int(config.get("max_position_embeddings") or 1 << 20)
        self.vocab_size = int(config["vocab_size"])
        self.folder = folder
        self.timing: Timing | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._stages: list[StageProcess] = []
        try:
            for stage in STAGES:
                self._stages.append(StageProcess(stage, folder / stage))
            self.prefill, self.decode = self._stages
            ready = [stage.event() for stage in self._stages]
            check_pair(*(message["digest"] for message in ready))
            self.port: int = ready[1]["port"]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End both processes."""
        for stage in self._stages:
            stage.close()
        self._stages = []

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The pair's tokenizer."""
        if self._tokenizer is None:
            if not any((self.folder / "decode").glob("tokenizer*")):
                raise PdtrimError(f"{self.folder} has no tokenizer: give token ids")
            self._tokenizer = AutoTokenizer.from_pretrained(
                self.folder / "decode", trust_remote_code=False
            )
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
            return list(self.tokenizer(prompt).input_ids)
        messages = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

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
        tokens = [self.encode(p, chat=chat) if isinstance(p, str) else list(p) for p in prompts]
        results = [Generation(prompt_tokens=len(t)) for t in tokens]
        for row, token in self.stream(
            tokens, max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=stop_ids
        ):
            results[row].tokens.append(token)
        stop = set(self.stop_ids if stop_ids is None else stop_ids)
        for result, size in zip(results, self.kv_bytes, strict=True):
            result.kv_bytes = size
            result.stopped = bool(result.tokens) and result.tokens[-1] in stop
            if any(isinstance(p, str) for p in prompts):
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
        """Yield (prompt's index, token id) as tokens come. Arguments as in :meth:`generate`."""
        if max_new_tokens < 1:
            raise PdtrimError(f"max_new_tokens {max_new_tokens} must be at least 1")
        requests = self._prefill(prompts, max_new_tokens)
        config = sampling or Sampling()
        self.decode.order(
            "generate",
            requests=requests,
            max_new_tokens=max_new_tokens,
            sampling=vars(config),
            stop=list(self.stop_ids if stop_ids is None else stop_ids),
        )
        try:
            while (event := self.decode.event())["event"] == "tokens":
                yield from zip(event["rows"], event["ids"], strict=True)
        except GeneratorExit:  # the caller stopped reading: keep orders and events in step
            while self.decode.event()["event"] == "tokens":
                pass
            raise
        self.kv_bytes: list[int] = event["bytes"]
        self.timing = Timing(
            prefill_s=self._prefilled["prefill_s"],
            handover_s=self._prefilled["handover_s"],
            decode_s=event["decode_s"],
            cache_bytes=event["cache_bytes"],
        )

    def score(self, batch: Batch) -> Tensor:
        """Logits ``[B, C, V]`` (fp32) of a batch's continuations, through both processes."""
        requests = self._prefill(batch.prompt_BP.tolist(), batch.continuation_BC.shape[1])
        with tempfile.TemporaryDirectory(prefix="pdtrim-") as folder:
            file = str(Path(folder) / "logits.safetensors")
            self.decode.order(
                "score", requests=requests, continuation=batch.continuation_BC.tolist(), file=file
            )
            self.kv_bytes = self.decode.event()["bytes"]
            return load_file(file)["logits"]

    def _prefill(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Message]:
        """Run prompts through prefill and the handover; returns decode's view of the requests."""
        if not prompts:
            raise PdtrimError("no prompt given")
        for tokens in prompts:
            self._check_prompt(tokens, new_tokens)
        requests = [
            {"id": secrets.token_hex(16), "tokens": len(t) - 1, "last": t[-1]} for t in prompts
        ]
        self.decode.order("expect", requests=requests)
        self.decode.event()
        self.prefill.order(
            "prefill",
            port=self.port,
            requests=[
                {"id": r["id"], "tokens": list(t[:-1])}
                for r, t in zip(requests, prompts, strict=True)
            ],
        )
        try:
            self._prefilled = self.prefill.event()
        except RuntimeFailure:
            self.decode.order("forget", requests=requests)
            self.decode.event()
            raise
        return requests

    def _check_prompt(self, tokens: Sequence[int], new_tokens: int) -> None:
        if not tokens:
            raise PdtrimError("the prompt is empty: give at least one token")
        if len(tokens) + new_tokens > self.max_tokens:
            raise PdtrimError(
                f"{len(tokens)} prompt tokens and {new_tokens} new ones pass the model's limit of"
                f" {self.max_tokens}"
            )
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise PdtrimError(f"token id {token} is not in the vocabulary")


def plan_of(folder: str | Path) -> PrunePlan:
    """The plan inside an exported pair."""
    return read_stage_config(Path(folder) / "decode", "decode")[1]
