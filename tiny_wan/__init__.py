"""Wan2.1's architecture at every size, its files, and a toy world small enough for a laptop."""

from tiny_wan.codec import ToyCodec
from tiny_wan.model import PRESETS, WanConfig, WanModel

__all__ = ["PRESETS", "ToyCodec", "WanConfig", "WanModel"]
