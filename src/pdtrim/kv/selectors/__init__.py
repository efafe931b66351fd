"""Selectors: which prompt tokens of a layer travel. One file a method."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pdtrim.kv.selectors.base import Mask, SelectorBase, StaticSelector
from pdtrim.kv.selectors.duo import Duo
from pdtrim.kv.selectors.expected_attention import ExpectedAttention
from pdtrim.kv.selectors.first_last import FirstLast
from pdtrim.kv.selectors.full import Full
from pdtrim.kv.selectors.gate import LinearGate
from pdtrim.kv.selectors.h2o import H2O
from pdtrim.kv.selectors.lazy_layer import LazyLayer
from pdtrim.kv.selectors.random import Random
from pdtrim.kv.selectors.snapkv import SnapKV
from pdtrim.kv.selectors.tova import Tova
from pdtrim.records import by_name

_Scored = SnapKV | Tova | H2O | ExpectedAttention | LinearGate
Selector = Annotated[
    Full | FirstLast | Random | LazyLayer | Duo | _Scored, Field(discriminator="name")
]
"""Any selector, as a plan writes it: ``{"name": ..., parameters}``."""

SELECTORS: dict[str, type[SelectorBase]] = by_name(Selector)

__all__ = [
    "H2O",
    "SELECTORS",
    "Duo",
    "ExpectedAttention",
    "FirstLast",
    "Full",
    "LazyLayer",
    "LinearGate",
    "Mask",
    "Random",
    "Selector",
    "SelectorBase",
    "SnapKV",
    "StaticSelector",
    "Tova",
]
