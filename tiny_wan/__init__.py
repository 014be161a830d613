"""Wan2.1's architecture at every size, its files, and a toy world small enough for a laptop."""

from pathlib import Path

from tiny_wan.codec import ToyCodec, WanCodec, open_codec
from tiny_wan.model import PRESETS, WanConfig, WanModel

__all__ = ["PRESETS", "WEIGHTS", "ToyCodec", "WanCodec", "WanConfig", "WanModel", "open_codec"]

WEIGHTS = Path(__file__).parent / "weights"  # a trained toy teacher and its interpolator
