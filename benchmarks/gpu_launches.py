"""Number of kernels that one sampling launches on a GPU, counted without a GPU.

A dispatch mode counts PyTorch's operations: each is one launch, except views and allocations, which are none. A Triton
kernel is one launch. The number is that of a CUDA graph's nodes, or slightly less, because a GPU needs several kernels
for a sort, and one more for a split matmul's sum. It is computed from the sizes alone, on tensors without data.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchpi.bench.model import make_observation
from torchpi.engine import InferenceEngine
from torchpi.engine.kernels import PLAIN, Kernels
from torchpi.engine.quantize import Quantization, attach_quantization, large_layers, quantized_layers
from torchpi.model.operations import Workload
from torchpi.model.pi0 import Pi0
from torchpi.model.rtc import ActionPrefix, Guidance
from torchpi.training.memory import without_data

aten = torch.ops.aten
_ALLOCATIONS = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
_READS = {aten._local_scalar_dense}
_LARGE = 1 << 30


class LaunchCounter(TorchDispatchMode):
    """Counts a device's launches by operation while it is entered.

    On "meta", masks are all True and numbers that are read are large: nothing is cut off.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.counts = Counter[str]()

    @property
    def total(self) -> int:
        """All launches."""
        return self.counts.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet, kwargs = func.overloadpacket, kwargs or {}
        if packet is aten.index and (made := _select(args)) is not None:
            self.counts.update([packet.__name__, "nonzero"])
            return made
        if packet in _READS and args[0].is_meta:
            return True if args[0].dtype is torch.bool else _LARGE
        out = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.device.type == self.device]
        is_view = not func._schema.is_mutable and not _makes_storage(results, (args, kwargs))
        if results and not is_view and packet not in _ALLOCATIONS | _READS:
            self.counts[packet.__name__] += 1
        return out

    def kernels(self) -> Kernels:
        """Stand-ins for the Triton kernels: their plain references, each counted as one launch."""

        def once(name: str, twin: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                before = self.counts.copy()
                out = twin(*args, **kwargs)
                launches = 0 if out is args[0] else 1  # to_fp8 before a matmul that is not fp8
                self.counts = before + Counter({f"triton {name}": launches})
                return out

            return run

        names = [field.name for field in dataclasses.fields(Kernels) if field.name != "name"]
        stand_ins: dict[str, Any] = {name: once(name, getattr(PLAIN, name)) for name in names}
        return Kernels(name="triton", **stand_ins)


def _makes_storage(results: Iterable[Tensor], arguments: Any) -> bool:
    """True if the result is neither an argument nor a view of one."""
    known = {leaf.untyped_storage()._cdata for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)}
    return any(tensor.untyped_storage()._cdata not in known for tensor in results)


def _select(args: Any) -> Tensor | None:
    """Masked selection from a tensor without data, which selects all elements."""
    tensor, indices = args
    if not tensor.is_meta or len(indices) != 1 or indices[0].dtype is not torch.bool:
        return None
    return torch.empty_like(tensor.flatten(0, indices[0].ndim - 1))


def count_launches(
    work: Workload, *, engine: bool, guided: bool = False, action_prefix: bool = False, fp8: bool = False
) -> tuple[int, dict[str, int]]:
    """Count the launches of one sampling, in total and by operation, the largest first.

    Args:
        engine: use an engine with Triton kernels and a warm bucket, otherwise the plain model.
        guided: guide by a previous chunk.
        action_prefix: condition on an action prefix.
        fp8: use an fp8 model on Hopper or Blackwell data center GPUs, whose matmul has a scale per output.
    """
    counter = LaunchCounter("meta")
    shape = (work.batch, work.config.require("action_horizon"), work.config.action_dim)
    device = "meta"
    with without_data():
        model = Pi0(work.config, device=device, dtype=work.dtype)
        if fp8:
            attach_quantization(model, Quantization("fp8", dict.fromkeys(large_layers(model), 1.0)))
            for layer in quantized_layers(model).values():
                layer.row_scales = True
        # The engine reads masks on the host.
        observation = make_observation(work, torch.device("cpu" if engine else device))
        chunk = torch.empty(shape, device=device)
        known = torch.empty(shape[:2], dtype=torch.bool, device=device)
        rtc: dict[str, Any] = {
            "guidance": Guidance(chunk, chunk) if guided else None,
            "action_prefix": ActionPrefix(chunk, known) if action_prefix else None,
        }
        sampler = InferenceEngine(model, mode="eager", kernels=counter.kernels()) if engine else model
        with counter:
            for _ in range(2):  # the first one computes values that depend only on the weights
                counter.counts.clear()
                sampler.sample_actions(observation, noise=chunk, num_steps=work.num_steps, **rtc)
    return counter.total, dict(counter.counts.most_common())


def launch_table(eager: dict[str, int], engine: dict[str, int]) -> Iterator[str]:
    """Lines of a Markdown table of launches by operation."""
    yield from ("| operation | plain model, eager | engine |", "| --- | --- | --- |")
    for name in sorted({**eager, **engine}, key=lambda name: -max(eager.get(name, 0), engine.get(name, 0))):
        yield f"| `{name}` | {eager.get(name, 0)} | {engine.get(name, 0)} |"
    yield f"| all | {sum(eager.values())} | {sum(engine.values())} |"
