"""Tokenizers and chat templates of strangers: whatever they raise is one line with the place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pdtrim.errors import ModelError, border
from pdtrim.models.stored import not_a_pointer
from pdtrim.reading.json_text import read_json

WHOLE = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
"""Any one of these carries a vocabulary; ``tokenizer_config.json`` alone does not."""
WORD = "pdtrim"


def load_tokenizer(folder: str | Path, **options: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model's folder; None if the folder has none.

    Args:
        options: for transformers, such as the name of a GGUF file in the folder.

    Raises:
        ModelError: a file that is missing, cut short, a pointer, or newer than the library.
    """
    folder = Path(folder)
    if "gguf_file" not in options:
        files = sorted(folder.glob("tokenizer*")) + [folder / name for name in WHOLE]
        files = [path for path in dict.fromkeys(files) if path.is_file()]
        if not files:
            return None
        for path in files:
            not_a_pointer(path)
            if path.suffix == ".json":
                read_json(path, limit=256 * 2**20, kind=ModelError)
        if not any(path.name in WHOLE for path in files):
            raise ModelError(f"{folder} has '{files[0].name}' but no vocabulary file")
    with border(ModelError, f"cannot read the tokenizer in {folder}"):
        made = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, **options)
        made("a b")  # some faults show at the first text only
    return made


def chat_text(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """A prompt as the user's turn in the tokenizer's chat template, ready for the answer.

    Raises:
        ModelError: a template that fails, that leaves the prompt out, or several of which none is
            the default.
    """
    where = "the model's chat template cannot be used; give the prompt raw (--raw)"
    with border(ModelError, where):
        text = _rendered(tokenizer, prompt)
        # a template that trims or escapes keeps a plain word; one that drops it drops any prompt
        if prompt.strip() not in text and WORD not in _rendered(tokenizer, WORD):
            raise ModelError(f"{where}: it leaves the prompt out")
    return text


def _rendered(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    if not isinstance(text, str):
        raise TypeError("it gives no text")
    return text
