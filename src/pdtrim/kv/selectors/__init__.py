"""Selectors: which prompt tokens of a layer travel. One file a method.

A selector is a pure function of the token count and its parameters, decided when that layer's
prefill ends. It returns runs ``(start, stop)`` of kept tokens, in order and disjoint.
"""

from __future__ import annotations

from pdtrim.kv.selectors.first_last import first_last
from pdtrim.kv.selectors.full import full
from pdtrim.plan import LayerKV

Runs = tuple[tuple[int, int], ...]


def kept_runs(rule: LayerKV, tokens: int, *, block_size: int = 1) -> Runs:
    """Runs of prompt tokens that one layer's rule keeps, of ``tokens`` handed over."""
    if rule.selector == "full":
        return full(tokens)
    return first_last(tokens, first=rule.first, last=rule.last, block_size=block_size)
