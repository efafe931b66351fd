"""A pair of stages as lm-eval sees a language model. Import it where lm-eval is installed.

Text becomes tokens as in lm-eval's model for transformers: context and continuation are encoded
together and split behind the context's tokens, spaces that end the context belong to the
continuation, and an empty context is the token that begins (or else ends) a text. Prefill then
runs the context without its last token; decode runs that token and all that follows.

``loglikelihood_rolling`` differs from lm-eval's: a text is cut into pieces of half a window, and
each is scored by decode behind a prompt of up to half a window that precedes it. lm-eval scores
most tokens in one forward, which prefill/decode inference never runs.
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from pdtrim.calibration.tokens import begin_ids, encode_for
from pdtrim.errors import PdtrimError
from pdtrim.evaluate.tasks.generation import generate_greedy
from pdtrim.evaluate.tasks.likelihood import Likelihood, Query, score
from pdtrim.progress import Progress, silent
from pdtrim.stage.forward import Trimmed

MAX_NEW_TOKENS = 256  # lm-eval's default
WINDOW = 2048


class PDTrimLM(TemplateLM):
    """Scores and generates with both stages of a trimmed pair; equal requests are run once.

    Args:
        batch_tokens: tokens that run together, see :func:`score`.
        window: tokens of a rolling window, at most what the model reads.

    Raises:
        PdtrimError: the model has no tokenizer, or one without a token that begins or ends texts.
    """

    def __init__(
        self,
        trimmed: Trimmed,
        *,
        batch_tokens: int = 8192,
        window: int = WINDOW,
        progress: Progress = silent,
    ) -> None:
        super().__init__()
        model = trimmed.pair.decode
        self.trimmed = trimmed
        self.tokenizer = model.need_tokenizer()
        self.batch_tokens = batch_tokens
        self.max_length = int(model.config.max_position_embeddings)
        self.window = min(window, self.max_length)
        self.progress = progress
        self._begin = begin_ids(self.tokenizer)
        self._ends = {self.eot_token_id, *model.end_ids}
        self._scored: dict[Query, Likelihood] = {}
        if self.prefix_token_id is None:
            raise PdtrimError(f"the tokenizer of '{model.name}' has no token that begins a text")

    @property
    def eot_token_id(self) -> Any:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> Any:
        """What stands for an empty context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids, behind the token that this tokenizer puts before every text, if it does."""
        del kwargs
        ids = encode_for(self.trimmed.pair.decode, string)
        if add_special_tokens is False or ids[: len(self._begin)] == self._begin:
            return ids
        return self._begin + ids

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        del disable_tqdm, kwargs
        found = self._score([self._query(context, new) for _, context, new in requests])
        return [(one.total, one.greedy) for one in found]

    def _query(self, context: list[int], continuation: list[int]) -> Query:
        """The query, its context cut on the left to what the model reads."""
        room = self.max_length + 1 - len(continuation)  # the last token is predicted, not read
        if not continuation or room < 1:
            raise PdtrimError(
                f"an answer of {len(continuation)} tokens cannot be scored by a model that reads"
                f" 1 to {self.max_length}"
            )
        kept = context[-room:] or [self.prefix_token_id]
        return Query(context=tuple(kept), continuation=tuple(continuation))

    def _score(self, queries: list[Query]) -> list[Likelihood]:
        new = [query for query in dict.fromkeys(queries) if query not in self._scored]
        found = score(self.trimmed, new, batch_tokens=self.batch_tokens, progress=self.progress)
        self._scored.update(zip(new, found, strict=True))
        return [self._scored[query] for query in queries]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of each whole text, nats; see the module for the windows."""
        del disable_tqdm
        half = max(1, self.window // 2)
        queries: list[Query] = []
        pieces: list[slice] = []
        for request in requests:
            ids = [self.prefix_token_id, *self.tok_encode(request.args[0], False)]
            first = len(queries)
            for start in range(1, len(ids), half):
                context = ids[max(0, start - half) : start]
                queries.append(self._query(context, ids[start : start + half]))
            pieces.append(slice(first, len(queries)))
        found = self._score(queries)
        return [sum(one.total for one in found[piece]) for piece in pieces]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The greedy answer to each context, up to its first stop string.

        Raises:
            PdtrimError: a request asks for sampling, or for more tokens than the model reads.
        """
        del disable_tqdm
        groups: dict[tuple[tuple[str, ...], int], list[str]] = {}
        wanted = [(request.args[0], _greedy_settings(request.args[1])) for request in requests]
        for context, settings in dict.fromkeys(wanted):
            groups.setdefault(settings, []).append(context)
        answers = {
            (context, settings): answer
            for settings, contexts in groups.items()
            for context, answer in zip(contexts, self._generate(contexts, *settings), strict=True)
        }
        return [answers[one] for one in wanted]

    def _generate(self, contexts: list[str], stops: tuple[str, ...], tokens: int) -> list[str]:
        room = self.max_length - tokens
        if room < 1:
            raise PdtrimError(
                f"{tokens} new tokens leave no room for a prompt: the model reads {self.max_length}"
            )
        prompts = [self.tok_encode(c)[-room:] or [self.prefix_token_id] for c in contexts]

        def finished(ids: list[int]) -> bool:
            if ids[-1] in self._ends:
                return True
            text = self.tokenizer.decode(ids)
            return any(stop in text for stop in stops)

        new = generate_greedy(
            self.trimmed,
            prompts,
            max_new_tokens=tokens,
            finished=finished,
            batch_tokens=self.batch_tokens,
            progress=self.progress,
        )
        texts = [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in new]
        return [_cut(text, stops) for text in texts]


def _greedy_settings(asked: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    """Stop strings and the most new tokens."""
    if asked.get("do_sample", asked.get("temperature", 0.0) > 0.0):
        raise PdtrimError("a task asks for sampling: pdtrim runs generation tasks greedily only")
    until = asked.get("until") or []
    stops = (until,) if isinstance(until, str) else tuple(until)
    return tuple(stop for stop in stops if stop), int(asked.get("max_gen_toks", MAX_NEW_TOKENS))


def _cut(text: str, stops: tuple[str, ...]) -> str:
    """The text before the first of the stop strings."""
    return min((text.split(stop, 1)[0] for stop in stops), key=len, default=text)
