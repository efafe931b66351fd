"""Errors that name a user's mistake. The command line prints them as one line and exits with 2."""


class PdtrimError(ValueError):
    """Something the user asked for cannot be done; the message says what to do instead."""


class ModelError(PdtrimError):
    """A model cannot be read, or is not one that pdtrim supports."""


class PlanError(PdtrimError):
    """A plan is invalid, or does not fit the model or the checkpoint it is used with."""


class CalibrationError(PdtrimError):
    """Calibration text is missing, unreadable or too short."""


class WireError(PdtrimError):
    """A KV frame is refused: wrong magic, version, digest, layout or length."""


class RuntimeFailure(PdtrimError):
    """A stage process refused a request or ended; the message carries its last words."""
