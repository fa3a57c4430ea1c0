"""Fast inference beside the plain model: static shapes, fused kernels, torch.compile or CUDA graphs."""

from torchpi.engine.engine import InferenceEngine, check_device

__all__ = ["InferenceEngine", "check_device"]
