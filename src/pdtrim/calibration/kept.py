"""Calibration text kept on disk, so that interrupted work goes on with the same."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from pdtrim.calibration.batches import Calibration, CalibrationConfig, load_calibration
from pdtrim.errors import CalibrationError
from pdtrim.keep.files import sha256_of
from pdtrim.keep.settings import Settings
from pdtrim.keep.tensors import load_kept, save_kept
from pdtrim.models.model import Model
from pdtrim.progress import Progress, silent
from pdtrim.stage.forward import Batch

SCHEMA = "pdtrim.text/1"
PARTS = ("search", "rerank", "fit")
SIDES = ("prompt_BP", "continuation_BC")


@dataclass(frozen=True, kw_only=True)
class _Origin:
    """What a text's file says of it beside its settings."""

    source: str
    hash: str


def text_settings(model: Model, config: CalibrationConfig) -> Settings:
    """All that a calibration text depends on; of a file its SHA-256, of a hub's data its name.

    Raises:
        CalibrationError: the file cannot be read.
    """
    return {
        "model": model.fingerprint,
        "dtype": model.dtype_name,
        "device": model.device.type,
        **asdict(config),
        "source_sha256": source_digest(config.source),
    }


def source_digest(source: str) -> str | None:
    """SHA-256 (hex) of a text file's bytes; None if the source is no file.

    Raises:
        CalibrationError: the file cannot be read.
    """
    path = Path(source)
    if source == "self" or source.startswith("hub:") or not path.is_file():
        return None
    try:
        return sha256_of(path)
    except OSError as error:
        raise CalibrationError(f"cannot read {source}: {error.strerror}") from error


def kept_calibration(
    model: Model, config: CalibrationConfig, path: Path, *, progress: Progress = silent
) -> Calibration:
    """The text that the file holds, or else what ``load_calibration`` makes, then written there.

    Raises:
        PdtrimError: the file was made by other settings, from another text or by another model, or
            is damaged; further as ``load_calibration``.
    """
    settings = text_settings(model, config)
    if path.exists():
        origin, tensors = load_kept(path, SCHEMA, settings, _Origin)
        try:
            search, rerank, fit = (
                Batch(**{side: tensors[f"{part}.{side}"] for side in SIDES}) for part in PARTS
            )
        except KeyError as error:
            raise CalibrationError(f"{path} has no {error}: delete it to start anew") from error
        return Calibration(
            search=search, rerank=rerank, fit=fit, source=origin.source, hash=origin.hash
        )
    text = load_calibration(model, config, progress=progress)
    tensors = {
        f"{part}.{side}": getattr(getattr(text, part), side) for part in PARTS for side in SIDES
    }
    save_kept(path, tensors, SCHEMA, settings, _Origin(source=text.source, hash=text.hash))
    return text
