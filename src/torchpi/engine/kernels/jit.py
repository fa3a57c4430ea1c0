"""`triton.jit` at a kernel's first launch, because plain versions in the same file must work without Triton."""

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
        """Placeholder in signatures, where Triton looks for a type with this name."""


class Kernel:
    """Function in Triton's language, launched by `kernel[grid](...)`.

    The first launch replaces the names `tl`, `constexpr` and `as_output` in the function's file by Triton's.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self.function: Any = inspect.unwrap(function)  # without the tests' shape checks, which Triton can't compile

    @functools.cached_property
    def compiled(self) -> Any:
        """The result of `triton.jit`, which interprets the function if TRITON_INTERPRET=1."""
        triton = require("triton", "gpu")
        language = require("triton.language", "gpu")
        names = {"tl": language, "constexpr": language.constexpr, "as_output": _compiled_as_output()}
        self.function.__globals__.update(names)
        return triton.jit(self.function)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return self.compiled[grid]


def as_output(x: "tl.tensor", dtype: constexpr, fp8_scale: "tl.tensor") -> Any:
    """Cast x to the dtype and, with a scale, to e4m3 (see `kernels.fp8`); in Triton's language."""
    x = x.to(dtype)
    if fp8_scale is not None:
        # A plain / is approximate on a GPU. The cast to e4m3 rounds to nearest, ties to even.
        x = tl.clamp(tl.div_rn(x.to(tl.float32), fp8_scale), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        x = x.to(tl.float8e4nv)
    return x


@functools.cache
def _compiled_as_output(function: Any = as_output) -> Any:
    function, language = inspect.unwrap(function), require("triton.language", "gpu")
    function.__globals__.update(tl=language, constexpr=language.constexpr)
    return require("triton", "gpu").jit(function)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`, for the extent of a tile."""
    return 1 << (size - 1).bit_length()


def token_strides(x: Tensor) -> tuple[int, int]:
    """Strides of batch and token; 0 for an axis of size 1, which is broadcast."""
    assert x.stride(-1) == 1
    batch, token = (0 if size == 1 else stride for size, stride in zip(x.shape[:2], x.stride()[:2], strict=True))
    return batch, token


@functools.cache
def num_processors(device: torch.device) -> int:
    """Number of a GPU's streaming multiprocessors; for the interpreter, that of an H200."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
