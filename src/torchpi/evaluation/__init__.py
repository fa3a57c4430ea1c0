"""Evaluation without a robot or a simulator: predicted action chunks compared with the recorded ones of a dataset."""

from torchpi.evaluation.chunks import Chunks as Chunks
from torchpi.evaluation.chunks import predict_chunks as predict_chunks
from torchpi.evaluation.chunks import sample_frames as sample_frames
from torchpi.evaluation.errors import ChunkErrors as ChunkErrors
from torchpi.evaluation.errors import chunk_errors as chunk_errors
from torchpi.evaluation.errors import errors_of as errors_of
from torchpi.evaluation.plots import plot_chunks as plot_chunks
from torchpi.evaluation.plots import plot_errors as plot_errors
