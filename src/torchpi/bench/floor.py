"""Floor of a workload: the time that its operations need at the machine's peak, and what was measured next to it.

The floor of an operation is the larger of FLOPs / peak and bytes / bandwidth, with the peak of a large matmul in the
same dtype and the bandwidth of a large copy, both measured in the same run. Matmuls and attention read their operands
and write their results once; each normalization, softmax, activation and residual reads and writes its tensors once.
Not counted: the last prefix layer behind its keys and values, padding, and the time conditioning of all steps but once.
A training step is three times the forward pass, and the optimizer's bytes.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console

from torchpi.config import GemmaConfig, Pi0Config, VisionConfig
from torchpi.model.pi0 import Pi0
from torchpi.ui.tables import Column, Table

# Master weight read and written, gradient read, both moments read and written; float32.
ADAMW_BYTES_PER_PARAMETER = 4 * (2 + 1 + 4)


@dataclasses.dataclass(frozen=True)
class Workload:
    """Sizes of one call of the model."""

    config: Pi0Config
    batch: int
    num_cameras: int
    prompt_tokens: int
    """Valid tokens of the prompt; it is padded to the config's max_token_len."""
    num_steps: int
    dtype: torch.dtype
    device: str = "cpu"
    flow_samples_per_obs: int = 1
    """Pairs of noise and time per observation, in training."""

    @property
    def prefix_tokens(self) -> int:
        """Valid tokens of one prefix."""
        return self.num_cameras * self.config.num_patches + self.prompt_tokens


@dataclasses.dataclass(frozen=True)
class Machine:
    """Peak rates of this machine, measured in this run."""

    flops: float
    """Per second, in the dtype of the workload."""
    bytes: float
    """Per second, read and written."""


@dataclasses.dataclass(frozen=True)
class Op:
    """Operations of one kind."""

    name: str
    flops: int
    bytes: int

    def floor(self, machine: Machine) -> float:
        """Seconds."""
        return max(self.flops / machine.flops, self.bytes / machine.bytes)


class _Counter:
    """Operations of one part of the model, in elements of one size."""

    def __init__(self, part: str, element_bytes: int) -> None:
        self.part, self.element_bytes = part, element_bytes

    def matmul(self, name: str, rows: int, num_in: int, num_out: int) -> Op:
        elements = rows * num_in + num_in * num_out + rows * num_out
        return Op(f"{self.part} {name}", 2 * rows * num_in * num_out, self.element_bytes * elements)

    def elementwise(self, name: str, elements: int) -> Op:
        return Op(f"{self.part} {name}", 0, 2 * self.element_bytes * elements)

    def layer(self, sizes: GemmaConfig | VisionConfig, batch: int, tokens: int, past: int = 0) -> Iterator[Op]:
        """A transformer layer; `past` keys and values are cached."""
        heads, width, hidden = sizes.num_heads, sizes.width, sizes.mlp_dim
        if isinstance(sizes, GemmaConfig):
            kv_heads, dim, mlp_inputs = sizes.num_kv_heads, sizes.head_dim, 2 * hidden  # gate and value
        else:
            kv_heads, dim, mlp_inputs = heads, width // heads, hidden
        rows, keys = batch * tokens, past + tokens
        yield self.elementwise("norm", 2 * rows * width)
        yield self.matmul("qkv", rows, width, (heads + 2 * kv_heads) * dim)
        elements = 2 * rows * heads * dim + 2 * batch * keys * kv_heads * dim
        yield Op(f"{self.part} attention", 4 * rows * keys * heads * dim, self.element_bytes * elements)
        yield self.elementwise("softmax", rows * heads * keys)
        yield self.matmul("attention out", rows, heads * dim, width)
        yield self.matmul("mlp", rows, width, mlp_inputs)
        yield self.elementwise("activation", rows * hidden)
        yield self.matmul("mlp", rows, hidden, width)
        yield self.elementwise("residual", 2 * rows * width)


def vision_ops(work: Workload) -> Iterator[Op]:
    """SigLIP over all cameras."""
    vit, patches = work.config.siglip, work.config.num_patches
    images = work.batch * work.num_cameras
    count = _Counter("vision", work.dtype.itemsize)
    yield _Counter("vision", 4).matmul("patch embedding", images * patches, 3 * vit.patch**2, vit.width)
    for _ in range(vit.depth):
        yield from count.layer(vit, images, patches)
    yield count.elementwise("norm", images * patches * vit.width)
    yield count.matmul("head", images * patches, vit.width, work.config.paligemma.width)


def prefix_ops(work: Workload) -> Iterator[Op]:
    """The backbone over the valid prefix tokens, up to the last layer's keys and values."""
    gemma, rows = work.config.paligemma, work.batch * work.prefix_tokens
    count = _Counter("prefix", work.dtype.itemsize)
    for _ in range(gemma.depth - 1):
        yield from count.layer(gemma, work.batch, work.prefix_tokens)
    yield count.elementwise("norm", rows * gemma.width)
    yield count.matmul("qkv", rows, gemma.width, 2 * gemma.num_kv_heads * gemma.head_dim)


def expert_ops(work: Workload, num_steps: int) -> Iterator[Op]:
    """The action expert in all steps, and the time conditioning once."""
    config, expert = work.config, work.config.action_expert
    horizon = config.require("action_horizon")
    tokens = horizon if config.pi05 else horizon + 1
    rows, width = work.batch * tokens, expert.width
    count, exact = _Counter("expert", work.dtype.itemsize), _Counter("suffix", 4)
    if config.pi05:
        yield exact.matmul("time", num_steps, width, width)
        yield exact.matmul("time", num_steps, width, width)
        for _ in range(2 * expert.depth + 1):
            yield count.matmul("modulation", num_steps, width, 3 * width)
    for _ in range(num_steps):
        yield exact.matmul("projections", work.batch * horizon, config.action_dim, width)
        if not config.pi05:
            yield exact.matmul("projections", work.batch, config.action_dim, width)  # the state
            yield exact.matmul("projections", work.batch * horizon, 2 * width, width)
            yield exact.matmul("projections", work.batch * horizon, width, width)
        for _ in range(expert.depth):
            yield from count.layer(expert, work.batch, tokens, work.prefix_tokens)
        yield count.elementwise("norm", rows * width)
        yield exact.matmul("projections", work.batch * horizon, width, config.action_dim)


def sampling_ops(work: Workload) -> list[Op]:
    """All operations of `sample_actions`."""
    return [*vision_ops(work), *prefix_ops(work), *expert_ops(work, work.num_steps)]


def training_ops(work: Workload) -> list[Op]:
    """All operations of a training step: forward, backward at twice the forward, AdamW."""
    # The flow samples of an observation share its prefix.
    suffixes = dataclasses.replace(work, batch=work.batch * work.flow_samples_per_obs)
    forward = [*vision_ops(work), *prefix_ops(work), *expert_ops(suffixes, num_steps=1)]
    parameters = sum(parameter.numel() for parameter in Pi0(work.config, device="meta").parameters())
    both = [Op(op.name, 3 * op.flops, 3 * op.bytes) for op in forward]
    return [*both, Op("optimizer AdamW", 0, ADAMW_BYTES_PER_PARAMETER * parameters)]


@dataclasses.dataclass(frozen=True)
class Result:
    """One benchmark and its floor in the same run; medians over the repeats."""

    name: str
    seconds: float
    floor: float
    """Seconds."""
    ratio: float
    """Each run's time over the floor at the machine's speed just then."""
    operations: list[Op]
    machine: Machine
    busy_seconds: float | None = None
    """While other processes kept all cores busy, where that was measured."""

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON document."""
        rates = {"flops_per_second": self.machine.flops, "bytes_per_second": self.machine.bytes}
        times = {"seconds": self.seconds, "floor": self.floor, "ratio": self.ratio}
        if self.busy_seconds is not None:
            times["busy_seconds"] = self.busy_seconds
        return {"name": self.name, **times, **rates}

    def print(self, console: Console) -> None:
        """Print the result, and the floor operation by operation."""
        console.print(
            f"\n[bold]{self.name}[/bold]: {1e3 * self.seconds:.1f} ms, floor {1e3 * self.floor:.1f} ms, ratio "
            f"{self.ratio:.2f} (this run: {self.machine.flops / 1e9:.0f} GFLOP/s, {self.machine.bytes / 1e9:.1f} GB/s)"
        )
        if self.busy_seconds is not None:
            times = f"{1e3 * self.busy_seconds:.1f} ms, {self.busy_seconds / self.seconds:.2f} times as long"
            console.print(f"while other processes keep all cores busy: {times}")
        totals: dict[str, list[float]] = {}
        for op in self.operations:
            row = totals.setdefault(op.name, [0.0, 0.0, 0.0])
            for i, value in enumerate((op.flops, op.bytes, op.floor(self.machine))):
                row[i] += value
        rows = [
            (name, f"{flops / 1e9:.2f}", f"{size / 1e9:.3f}", f"{1e3 * floor:.2f}", f"{100 * floor / self.floor:.1f} %")
            for name, (flops, size, floor) in sorted(totals.items(), key=lambda item: -item[1][2])
        ]
        columns = [Column("operation"), *(Column(title, "number") for title in ("GFLOP", "GB", "floor ms", "share"))]
        console.print(Table(columns, rows).to_rich())


def measure(name: str, run: Callable[[], Any], operations: list[Op], work: Workload, repeats: int) -> Result:
    """Time a workload and the machine in turn, because the speed of a shared machine drifts within seconds."""
    device = torch.device(work.device)
    measure_now = measure_machine(work.dtype, device)
    for _ in range(2):  # warm-up
        measure_now()
        run()
    machines, times, floors = [], [], []
    for _ in range(repeats):
        machines.append(measure_now())
        floors.append(sum(op.floor(machines[-1]) for op in operations))
        times.append(timed(run, device))
    ratios = [seconds / floor for seconds, floor in zip(times, floors, strict=True)]
    machine = Machine(*(statistics.median(getattr(m, field) for m in machines) for field in ("flops", "bytes")))
    return Result(
        name, statistics.median(times), statistics.median(floors), statistics.median(ratios), operations, machine
    )


def measure_machine(dtype: torch.dtype, device: torch.device) -> Callable[[], Machine]:
    """A function that measures the peak of a large matmul and the bandwidth of a large copy, now: the best of three."""
    side = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.empty(1 << (27 if device.type == "cpu" else 30), dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)

    def measure() -> Machine:
        matmul = min(timed(lambda: torch.mm(a, b, out=product), device) for _ in range(3))
        copy = min(timed(lambda: target.copy_(source), device) for _ in range(3))
        return Machine(flops=2 * side**3 / matmul, bytes=2 * source.numel() / copy)

    return measure


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one run."""
    synchronize = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start
