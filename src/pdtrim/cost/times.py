"""Times of one stage on one machine: the file that holds them, and what lies between its rows.

Schema ``pdtrim.stage-times/1``. Prefill's rows are whole prompts, one at a time; decode's rows are
single steps of a batch. A row says how long the whole model takes and, of that, the attentions, the
MLPs (each with the norm before it) and, in prefill, the making of keys and values inside attention.
What remains is outside the blocks. The parts are needed for a pair that lost blocks.

Between rows times are linear in tokens and in sequences; beyond them nothing is said.
"""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator

from pdtrim.errors import PdtrimError
from pdtrim.reading.json_text import read_json
from pdtrim.records import MOST_TOKENS, Frozen, first_problem

MAX_FILE_BYTES = 4 * 2**20


class Shape(Frozen):
    """What of a dense model decides its costs.

    Attributes:
        parameters: of the whole model, embedding and head included.
    """

    name: str
    layers: int = Field(gt=0, le=4096)
    hidden: int = Field(gt=0, le=2**20)
    neurons: int = Field(gt=0, le=2**24)
    heads: int = Field(gt=0, le=4096)
    kv_heads: int = Field(gt=0, le=4096)
    head_dim: int = Field(gt=0, le=4096)
    parameters: int = Field(gt=0, le=2**50)

    @property
    def attention_parameters(self) -> int:
        """Of one block's attention."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    @property
    def mlp_parameters(self) -> int:
        """Of one block's gated MLP."""
        return 3 * self.hidden * self.neurons

    @property
    def layer_pairs(self) -> int:
        """Numbers of K and V that one token has in one layer."""
        return 2 * self.kv_heads * self.head_dim


class Row(Frozen):
    """Seconds of the whole model, and of its parts, each summed over all layers."""

    seconds: float = Field(gt=0)
    attention_s: float | None = Field(default=None, ge=0)
    mlp_s: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Row:
        if (self.attention_s is None) != (self.mlp_s is None):
            raise ValueError("give attention_s and mlp_s, or neither")
        if (self.attention_s or 0) + (self.mlp_s or 0) > self.seconds * (1 + 1e-6):
            raise ValueError("attention_s and mlp_s are more than seconds")
        return self


class PrefillRow(Row):
    """One prompt.

    Attributes:
        kv_s: of ``attention_s``, the making of keys and values.
    """

    tokens: int = Field(gt=0, le=MOST_TOKENS)
    kv_s: float | None = Field(default=None, ge=0)


class DecodeRow(Row):
    """One step of ``rows`` sequences with ``context`` tokens each."""

    rows: int = Field(gt=0, le=2**20)
    context: int = Field(gt=0, le=MOST_TOKENS)


class StageTimes(Frozen):
    """Times of a dense model's stages on one system.

    Attributes:
        source: who measured, with what version.
        system: name of the machine, such as ``h100_sxm``.
        gpus: that one server has (tensor parallel).
        gpu_memory_bytes: of one GPU.
        itemsize: bytes of one number in weights and cache.
        front_s, front_token_s: what a request spends outside the GPUs until its first token, and
            for each token of its prompt (HTTP, router, tokenizers, polling); 0 if not measured.
    """

    schema_id: Literal["pdtrim.stage-times/1"] = Field(alias="schema")
    source: str = Field(min_length=1, max_length=500)
    system: str = Field(min_length=1, max_length=100)
    gpus: int = Field(default=1, gt=0, le=1024)
    gpu_memory_bytes: int = Field(gt=0, le=2**50)
    itemsize: int = Field(default=2, ge=1, le=4)
    model: Shape
    front_s: float = Field(default=0.0, ge=0)
    front_token_s: float = Field(default=0.0, ge=0)
    prefill: tuple[PrefillRow, ...] = Field(min_length=2, max_length=10_000)
    decode: tuple[DecodeRow, ...] = Field(min_length=4, max_length=10_000)

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_by_name=True, validate_by_alias=True
    )

    @model_validator(mode="after")
    def _check(self) -> StageTimes:
        tokens = [row.tokens for row in self.prefill]
        if sorted(set(tokens)) != tokens:
            raise ValueError("prefill: rows must have growing tokens")
        rows, contexts = self.rows, self.contexts
        places = sorted((row.rows, row.context) for row in self.decode)
        if places != [(r, c) for r in rows for c in contexts] or min(len(rows), len(contexts)) < 2:
            raise ValueError(
                "decode: rows must be a grid, each count of rows with each context, 2 or more each"
            )
        return self

    @property
    def rows(self) -> list[int]:
        """Counts of sequences in decode's grid."""
        return sorted({row.rows for row in self.decode})

    @property
    def contexts(self) -> list[int]:
        """Context lengths in decode's grid."""
        return sorted({row.context for row in self.decode})

    @property
    def most_rows(self) -> int:
        """Sequences of the largest measured batch."""
        return self.rows[-1]

    def front(self, tokens: float) -> float:
        """Seconds of a prompt outside the GPUs."""
        return self.front_s + self.front_token_s * tokens

    def prompt(self, tokens: float, part: str = "seconds") -> float:
        """Seconds of one prompt, or of a part of it.

        Raises:
            PdtrimError: beyond the measured lengths, or a part that the file does not have.
        """
        at = [row.tokens for row in self.prefill]
        low, share = self._between(at, tokens, "prompts of", "tokens")
        return _mixed([(self._value(self.prefill[i], part), w) for i, w in _pair(low, share)])

    def step(self, rows: float, context: float, part: str = "seconds") -> float:
        """Seconds of one decode step, or of a part of it; fewer rows than measured cost as many.

        Raises:
            PdtrimError: beyond the measured grid, or a part that the file does not have.
        """
        grid = {(row.rows, row.context): row for row in self.decode}
        all_rows, contexts = self.rows, self.contexts
        r, r_share = self._between(all_rows, max(rows, all_rows[0]), "batches of", "sequences")
        c, c_share = self._between(contexts, max(context, contexts[0]), "contexts of", "tokens")
        return _mixed(
            [
                (self._value(grid[all_rows[i], contexts[j]], part), v * w)
                for i, v in _pair(r, r_share)
                for j, w in _pair(c, c_share)
            ]
        )

    def _value(self, row: Row, part: str) -> float:
        value = getattr(row, part)
        if value is None:
            raise PdtrimError(
                f"the stage times of {self.system} ({self.source}) have no {part}, which a pair"
                " that lost blocks needs: measure attention, MLP and K and V apart"
            )
        return float(value)

    def _between(self, at: list[int], x: float, what: str, unit: str) -> tuple[int, float]:
        if not at[0] <= x <= at[-1]:
            raise PdtrimError(
                f"{what} {x:,.0f} {unit} are beyond what is measured on {self.system}"
                f" ({at[0]:,} to {at[-1]:,}; {self.source}): give --stages with more"
            )
        low = min(bisect_right(at, x) - 1, len(at) - 2)
        return low, (x - at[low]) / (at[low + 1] - at[low])

    @classmethod
    def load(cls, path: str | Path) -> StageTimes:
        """Read a file of stage times.

        Raises:
            PdtrimError: no such file, too large, not JSON, or not of this schema.
        """
        data = read_json(path, limit=MAX_FILE_BYTES)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise PdtrimError(f"{path}: {first_problem(error)}") from error


def _pair(low: int, share: float) -> tuple[tuple[int, float], tuple[int, float]]:
    return (low, 1 - share), (low + 1, share)


def _mixed(parts: list[tuple[float, float]]) -> float:
    return sum(value * weight for value, weight in parts)
