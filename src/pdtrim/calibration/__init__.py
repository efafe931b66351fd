"""Calibration: text to (prompt, continuation) batches, and the dense model's word on them."""

from pdtrim.calibration.batches import Calibration, CalibrationConfig, load_calibration
from pdtrim.calibration.teacher import Teacher

__all__ = ["Calibration", "CalibrationConfig", "Teacher", "load_calibration"]
