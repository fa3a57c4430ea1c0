"""Judging a policy without a robot or a simulator: predicted beside recorded action chunks of a data set."""

from torchpi.evaluation.chunks import Chunks, predict_chunks, sample_frames
from torchpi.evaluation.errors import ChunkErrors, chunk_errors, errors_of
from torchpi.evaluation.plots import plot_chunks, plot_errors

__all__ = [
    "ChunkErrors",
    "Chunks",
    "chunk_errors",
    "errors_of",
    "plot_chunks",
    "plot_errors",
    "predict_chunks",
    "sample_frames",
]
