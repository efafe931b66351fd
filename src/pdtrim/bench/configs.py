"""What each benchmark may be asked. No torch here: the command's options are made of these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MEASURED = "measured"
"""A link that is timed, not reckoned."""
Transport = Literal["copy", "nixl"]


@dataclass(frozen=True, kw_only=True)
class CodecsConfig:
    """Which codecs to time, on how much.

    Attributes:
        codecs: codecs to time.
        heads: KV heads, over all layers.
        tokens: tokens of each head.
        width: channels of each head.
        repeats: runs of each; the median counts.
    """

    codecs: tuple[str, ...] = (
        "int8",
        "int4",
        "k3v2:rotate=true",
        "int2:rotate=true",
        "fp8",
        "entropy",
        "lossless",
    )
    heads: int = 90
    tokens: int = 2048
    width: int = 64
    repeats: int = 5


@dataclass(frozen=True, kw_only=True)
class ForwardConfig:
    """On how much to time the simulator.

    Attributes:
        prompt_tokens: tokens of each prompt.
        continuation_tokens: tokens that follow each prompt.
        rows: sequences a batch.
        repeats: runs of each; the median counts.
    """

    prompt_tokens: int = 512
    continuation_tokens: int = 256
    rows: int = 4
    repeats: int = 5


@dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """Which handovers to time, over which links.

    Attributes:
        tokens: tokens of the prompt that prefill runs.
        links: measured, or Gbit/s to pace moves by bytes.
        policies: KV policies that need no prompt, beside the rows that are always there.
        to: the device that receives; a second GPU where there is one, else the same.
        transport: how measured links move, by a copy in this process or by nixl into another one.
        repeats: rounds; medians count.
    """

    tokens: int = 3824
    links: tuple[str, ...] = (MEASURED,)
    policies: tuple[str, ...] = (
        "full",
        "full+int4",
        "full+k3v2:rotate=true",
        "full+int2:rotate=true",
        "full+entropy",
        "full+lossless",
    )
    to: str | None = None
    transport: Transport = "copy"
    repeats: int = 5


@dataclass(frozen=True, kw_only=True)
class StagesConfig:
    """Which shares of the stages' blocks to time without.

    Attributes:
        tokens: tokens of the prompt; decode runs one token behind so many.
        shares: shares of a stage's blocks to remove; the rows' ratios are over share 0, which is
            always there.
        repeats: rounds; medians count.
    """

    tokens: int = 3824
    shares: tuple[float, ...] = (0.25, 1 / 3, 0.5)
    repeats: int = 5
