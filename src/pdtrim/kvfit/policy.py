"""What a user may ask to send: a policy, or a budget. Read once, where the user's text comes in."""

from __future__ import annotations

from pdtrim.kvfit.budget import KVBudget
from pdtrim.kvfit.request import KVRequest

KVPolicy = KVRequest | KVBudget
"""Both have ``text`` and ``resolve(model, batch, ...)``, which gives one rule a layer."""


def parse_policy(text: str) -> KVPolicy:
    """Read ``budget:compression=X`` or the grammar of ``kvfit/request.py``.

    Raises:
        PlanError: the text is neither.
    """
    return KVBudget.parse(text) if text.startswith("budget") else KVRequest.parse(text)
