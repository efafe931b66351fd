"""What real pairs answer to a prompt: each is started as two processes and asked.

A plan is exported first; an exported pair is taken as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from pdtrim.bundle import TrimPlan
from pdtrim.models.model import Model
from pdtrim.progress import Progress, silent
from pdtrim.runtime.session import Session

TOKENS = 80


def answers_to(
    prompt: str, trims: Mapping[str, TrimPlan], model: Model, progress: Progress = silent
) -> dict[str, str]:
    """At most 80 tokens of greedy text, by name.

    Raises:
        PdtrimError: the model has no tokenizer, or a process failed.
    """
    found = {}
    with TemporaryDirectory() as folder, progress("asking the pairs", len(trims)) as advance:
        for number, (name, trim) in enumerate(trims.items()):
            pair = trim.exported or trim.export(model, Path(folder) / str(number))
            with Session(pair) as session:
                found[name] = session.generate([prompt], max_new_tokens=TOKENS)[0].text
            advance(1)
    return found
