"""Pack text into (prompt, continuation) sequences, in three parts that share no token.

*search* steers the search, *rerank* chooses among its finalists and repairs, *fit* is what repaired
and trained weights are fitted to. Quality claims use another source altogether.

Shapes: n sequences, P prompt tokens, C continuation tokens.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pdtrim.calibration.self_text import write_own_text
from pdtrim.calibration.sources import read_documents
from pdtrim.calibration.tokens import begin_ids, check_ids, check_length, encode_for
from pdtrim.errors import CalibrationError
from pdtrim.models.model import Model
from pdtrim.progress import Progress, silent
from pdtrim.stage.forward import Batch

SECTION = 8  # sequences; longer documents are shuffled in sections of this many
SPARE = 4  # read this many times the tokens needed, so that a seed has a choice


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """How much text, cut how."""

    source: str = "self"
    prompt_tokens: int = 256
    continuation_tokens: int = 128
    search: int = 12
    rerank: int = 6
    fit: int = 24
    seed: int = 0

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.continuation_tokens < 1:
            raise CalibrationError("prompt and continuation need at least 1 token each")
        if self.search < 1 or self.rerank < 0 or self.fit < 0:
            raise CalibrationError("at least 1 search sequence is needed, and no part below 0")

    @property
    def sequences(self) -> int:
        """Sequences in all three parts."""
        return self.search + self.rerank + self.fit


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Three disjoint parts of packed text; only ``search`` is never empty."""

    search: Batch
    rerank: Batch
    fit: Batch
    source: str
    hash: str

    @property
    def fitted(self) -> Batch:
        """What repairs are fitted to: the part for it, or the search's where that is empty."""
        return self.fit if len(self.fit) else self.search


def load_calibration(
    model: Model, config: CalibrationConfig, *, progress: Progress = silent
) -> Calibration:
    """Read or write the text, tokenise, pack and split it. The same seed gives the same batches.

    Raises:
        CalibrationError: unreadable source, or too little text.
    """
    ids_nW = read_sequences(model, config, progress=progress)
    a, b = config.search, config.search + config.rerank
    text = Batch.cut(ids_nW, config.prompt_tokens)
    digest = hashlib.sha256(ids_nW.numpy().tobytes()).hexdigest()
    return Calibration(
        search=text[:a], rerank=text[a:b], fit=text[b:], source=config.source, hash=digest
    )


def read_sequences(
    model: Model, config: CalibrationConfig, *, progress: Progress, at_least: int | None = None
) -> Tensor:
    """Token ids of a source's sequences, all parts of the text together, ``[n, P + C]``.

    Args:
        at_least: how few a source may have; None for all.

    Raises:
        CalibrationError: as :func:`load_calibration`.
    """
    width, count = config.prompt_tokens + config.continuation_tokens, config.sequences
    if config.source == "self":
        return write_own_text(
            model, sequences=count, tokens=width, seed=config.seed, progress=progress
        )
    return pack(
        model,
        read_documents(config.source),
        sequences=count,
        width=width,
        seed=config.seed,
        at_least=at_least,
    )


def text_batch(
    model: Model, source: str, *, prompt_tokens: int, continuation_tokens: int, limit: int
) -> Batch:
    """The first ``limit`` sequences of a held-out text, in file order."""
    width = prompt_tokens + continuation_tokens
    documents = read_documents(source)
    ids_nW = pack(model, documents, sequences=limit, width=width, seed=None, at_least=1)
    return Batch.cut(ids_nW, prompt_tokens)


def pack(
    model: Model,
    documents: Iterable[str],
    *,
    sequences: int,
    width: int,
    seed: int | None,
    at_least: int | None = None,
) -> Tensor:
    """Join tokenised documents with the end token and cut sequences of ``width``, ``[n, width]``.

    A tokenizer that begins text with a special token (Llama's BOS, an attention sink) begins each
    sequence with it. With a seed the documents are shuffled; long ones in sections.
    """
    tokenizer = model.need_tokenizer()
    check_length(width, model.config, "sequences")
    prefix = begin_ids(tokenizer)
    body = width - len(prefix)
    if body < 1:
        raise CalibrationError(f"sequences of {width} tokens leave no room for text")
    wanted = sequences * (SPARE if seed is not None else 1)
    sections: list[list[int]] = []
    have = 0
    for text in documents:
        ids = encode_for(model, text)
        size = SECTION * body
        sections += [ids[i : i + size] for i in range(0, len(ids), size)]
        have += len(ids) + 1
        if have >= wanted * body:
            break
    if seed is not None:
        random.Random(seed).shuffle(sections)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    check_ids([*prefix, *end], int(model.config.vocab_size))
    stream = [token for section in sections for token in (*section, *end)]
    count = min(sequences, len(stream) // body)
    if count < (sequences if at_least is None else at_least):
        raise CalibrationError(
            f"the text has {len(stream)} tokens, but {sequences} sequences of {width} need"
            f" {sequences * body}: give more text, or fewer or shorter sequences"
        )
    rows = [prefix + stream[i * body : (i + 1) * body] for i in range(count)]
    return torch.tensor(rows, dtype=torch.long)
