"""Weights from disk and back: the formats, and one entry to read them all."""

from torchpi.checkpoints.checkpoint import load_model

__all__ = ["load_model"]
