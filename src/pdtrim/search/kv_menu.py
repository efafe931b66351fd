"""What a byte budget may mix, and how a user writes a budget."""

from __future__ import annotations

import math
import re
from typing import Literal

from pydantic import Field

from pdtrim.errors import PlanError
from pdtrim.records import Frozen, shortened
from pdtrim.search.kv_request import KVRequest

Codecs = Literal["any", "packed"]

NUMBER = r"[0-9]+(?:\.[0-9]*)?(?:e[+-]?[0-9]{1,4})?|\.[0-9]+"
BUDGET = re.compile(rf"budget:compression=({NUMBER})(?:,codecs=(any|packed))?", re.ASCII)
"""Reads all that :attr:`KVBudget.text` writes, and plain numbers."""

STEPS = ((0.2, 0.5), (0.3, 0.7), (0.3, 1.1), (0.4, 0.9), (0.6, 0.9), (0.6, 1.4), (1.0, 1.8))
"""Of keys and of values, for the entropy codec."""


class KVBudget(Frozen):
    """``budget:compression=X[,codecs=packed]``.

    Attributes:
        codecs: ``packed`` leaves the entropy codec out: its Huffman codes are made on the host, at
            a fraction of the speed, and only slow links repay them.
    """

    compression: float = Field(ge=1, allow_inf_nan=False)
    codecs: Codecs = "any"

    @property
    def text(self) -> str:
        """As a user writes it."""
        codecs = "" if self.codecs == "any" else f",codecs={self.codecs}"
        number = repr(self.compression).removesuffix(".0")  # as many digits as tell it apart
        return f"budget:compression={number}{codecs}"


def parse_budget(text: str) -> KVBudget | None:
    """The budget that a KV policy asks for; None for any other policy.

    Raises:
        PlanError: neither a budget nor a policy.
    """
    if not text.startswith("budget"):
        KVRequest.parse(text)  # so that a mistake is seen before any work
        return None
    found = BUDGET.fullmatch(text)
    if found is None:
        raise PlanError(
            f"KV policy '{shortened(text)}': write budget:compression=5 or"
            " budget:compression=5,codecs=packed"
        )
    compression = float(found[1])
    if not 1 <= compression < math.inf:
        raise PlanError(f"KV compression {shortened(found[1])} must be a number of at least 1")
    return KVBudget(compression=compression, codecs="packed" if found[2] == "packed" else "any")


def default_menu(head_dim: int, codecs: Codecs = "any") -> tuple[str, ...]:
    """Selectors and codecs to mix; keys and values are rotated where the width allows it."""
    rotate = ",rotate=true" if head_dim & (head_dim - 1) == 0 else ""
    grids = [f"{c}:recent=0,group=128{rotate}" for c in ("k4v3", "k4v2", "int3", "k3v2", "int2")]
    whole = ["raw", "int8:recent=0", f"int4:recent=0{rotate}", *grids]
    fine, mild, coarse = grids[0], grids[2], grids[3]
    if codecs == "any":
        coded = [f"entropy:k_step={k},v_step={v}" for k, v in STEPS]
        whole += coded
        fine, mild, coarse = coded[1], coded[3], coded[5]
    cut = [f"snapkv:share={share}+{codec}" for share in (0.75, 0.5) for codec in (mild, coarse)]
    few = [
        "first_last:first=4,last=60,layers=all",
        f"first_last:first=4,last=124,layers=all+{fine}",
        f"duo:share=0.5,first=4,last=60+{fine}",
        f"snapkv:share=0.25+{fine}",
    ]
    return (*(f"full+{codec}" for codec in whole), *cut, *few)
