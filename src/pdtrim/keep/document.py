"""A record that is a JSON file of ours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict, ValidationError

from pdtrim.errors import PdtrimError
from pdtrim.keep.files import write_json
from pdtrim.reading.json_text import MAX_BYTES, read_json
from pdtrim.records import Frozen, first_problem

if TYPE_CHECKING:
    from typing_extensions import Self


class Document(Frozen):
    """Written whole as JSON; its field ``schema_id`` is the file's ``schema``.

    Attributes:
        largest: bytes of a file that is read.
        kind: of the error where a file is not this record.
    """

    largest: ClassVar[int] = MAX_BYTES
    kind: ClassVar[type[PdtrimError]] = PdtrimError

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_by_name=True, validate_by_alias=True
    )

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dump``."""
        return self.model_dump(mode="json", by_alias=True)

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file.

        Raises:
            PdtrimError: of the record's kind: missing, too large, not JSON, unknown keys, or
                another schema.
        """
        data = read_json(path, limit=cls.largest, kind=cls.kind)
        return cls.from_json(data, source=str(path))

    @classmethod
    def from_json(cls, data: Any, *, source: str = "the data") -> Self:
        """Validate plain data; ``source`` names it in the error."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise cls.kind(f"{source}: {first_problem(error)}") from error
