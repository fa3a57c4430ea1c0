"""The fast path of inference, beside the plain model: static shapes, fused kernels, compiled or as CUDA graphs."""

from torchpi.engine.engine import InferenceEngine, check_device

__all__ = ["InferenceEngine", "check_device"]
