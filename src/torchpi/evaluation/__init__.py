"""Evaluation without a robot or a simulator: predicted action chunks compared with the recorded ones of a dataset."""

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
