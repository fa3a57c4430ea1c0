"""The fast path of inference, beside the plain model: static shapes, fused kernels, compiled or as CUDA graphs."""

from torchpi.engine.engine import InferenceEngine

__all__ = ["InferenceEngine"]
