"""What a byte budget may mix: every codec's own entries, and some selectors with a codec beside."""

from __future__ import annotations

from typing import Literal

from pdtrim.kv.codecs import CODECS

Codecs = Literal["any", "packed"]
"""``packed`` leaves out codecs of variable length: they are slower than those of fixed length."""


def default_menu(head_dim: int, codecs: Codecs = "any") -> tuple[str, ...]:
    """KV policies in the grammar of ``kvfit/request.py``."""
    kinds = [kind for kind in CODECS.values() if codecs == "any" or not kind.variable]
    whole = [f"full+{text}" for kind in kinds for text in kind.menu(head_dim)]
    fine, mild, coarse = [beside for kind in kinds if (beside := kind.beside(head_dim))][-1]
    cut = [f"snapkv:share={share}+{codec}" for share in (0.75, 0.5) for codec in (mild, coarse)]
    few = [
        "first_last:first=4,last=60,layers=all",
        f"first_last:first=4,last=124,layers=all+{fine}",
        f"duo:share=0.5,first=4,last=60+{fine}",
        f"snapkv:share=0.25+{fine}",
    ]
    return (*whole, *cut, *few)
