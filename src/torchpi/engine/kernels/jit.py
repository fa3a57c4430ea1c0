"""`triton.jit` at a kernel's first launch: the file of a kernel has its plain twin, which works without Triton."""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchpi.extras import require

if TYPE_CHECKING:
    import triton.language as tl

    constexpr = Any
else:
    tl = None

    class constexpr:
        """Stands for Triton's in a signature, where Triton looks for a type of this name."""


class Kernel:
    """A function in Triton's language, compiled and launched by `kernel[grid](...)`.

    The names `tl`, `constexpr` and `as_output` of its file become Triton's then.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self.function: Any = inspect.unwrap(function)  # without the shape checks of tests, which Triton can't read

    @functools.cached_property
    def compiled(self) -> Any:
        """The function that Triton compiles or, with TRITON_INTERPRET=1, interprets."""
        triton = require("triton", "gpu")
        language = require("triton.language", "gpu")
        names = {"tl": language, "constexpr": language.constexpr, "as_output": _compiled_as_output()}
        self.function.__globals__.update(names)
        return triton.jit(self.function)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return self.compiled[grid]


def as_output(x: "tl.tensor", dtype: constexpr, fp8_scale: "tl.tensor") -> Any:
    """In Triton's language: x in the dtype or, with a scale, e4m3 of that (see `kernels.fp8`)."""
    x = x.to(dtype)
    if fp8_scale is not None:
        # A plain / is approximate on a GPU, and the cast to e4m3 rounds to nearest, ties to even.
        x = tl.clamp(tl.div_rn(x.to(tl.float32), fp8_scale), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        x = x.to(tl.float8e4nv)
    return x


@functools.cache
def _compiled_as_output(function: Any = as_output) -> Any:
    function, language = inspect.unwrap(function), require("triton.language", "gpu")
    function.__globals__.update(tl=language, constexpr=language.constexpr)
    return require("triton", "gpu").jit(function)


def power_of_two(size: int) -> int:
    """The least power of two that is not below `size`: the extent of a tile."""
    return 1 << (size - 1).bit_length()


def token_strides(x: Tensor) -> tuple[int, int]:
    """Strides of batch and token of a tensor whose rows may be those of all samples or of all tokens."""
    assert x.stride(-1) == 1
    batch, token = (0 if size == 1 else stride for size, stride in zip(x.shape[:2], x.stride()[:2], strict=True))
    return batch, token


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; as many as an H200 has for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
