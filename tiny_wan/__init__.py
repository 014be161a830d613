"""Wan2.1's transformer at every size, its files and codecs, and a toy world for a laptop."""

from pathlib import Path

from tiny_wan.codec import ToyCodec, WanCodec, open_codec
from tiny_wan.model import PRESETS, WanConfig, WanModel

__all__ = ["PRESETS", "STUDENT", "WEIGHTS", "ToyCodec", "WanCodec", "WanConfig", "WanModel",
           "open_codec"]

WEIGHTS = Path(__file__).parent / "weights"  # of a toy teacher, and of its interpolator
STUDENT = WEIGHTS / "student"  # distilled from it
