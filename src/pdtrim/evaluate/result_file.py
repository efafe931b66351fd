"""A record that is a file of results."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, ValidationError

from pdtrim.errors import PdtrimError
from pdtrim.keep.files import write_json
from pdtrim.reading.json_text import read_json
from pdtrim.records import Frozen, first_problem

R = TypeVar("R", bound="ResultFile")

MAX_RESULT_BYTES = 64 * 2**20


class ResultFile(Frozen):
    """Written whole as JSON; its field ``schema_id`` is the file's ``schema``."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_by_name=True, validate_by_alias=True
    )

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return self.model_dump(mode="json", by_alias=True)

    def save(self, path: str | Path) -> None:
        """Write the result as JSON."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls: type[R], path: str | Path) -> R:
        """Read and validate a result file.

        Raises:
            PdtrimError: missing, too large, not JSON, or not of this schema.
        """
        data = read_json(path, limit=MAX_RESULT_BYTES)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise PdtrimError(f"{path}: {first_problem(error)}") from error
