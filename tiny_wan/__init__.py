"""Wan2.1's architecture at every size, its files, and a toy world small enough for a laptop."""

from tiny_wan.codec import ToyCodec, WanCodec, open_codec
from tiny_wan.model import PRESETS, WanConfig, WanModel

__all__ = ["PRESETS", "ToyCodec", "WanCodec", "WanConfig", "WanModel", "open_codec"]
