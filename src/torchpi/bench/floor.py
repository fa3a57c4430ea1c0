"""Floor of a workload: the time that its operations need at the machine's peak, and what was measured next to it.

The floor of an operation is the larger of FLOPs / peak and bytes / bandwidth, with the peak of a large matmul in the
same dtype and the bandwidth of a large copy, both measured in the same run. `model.operations` counts both.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console

from torchpi.model.operations import Machine, Op, Workload
from torchpi.ui.tables import Column, Table


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
        console.print(Table(columns, rows).to_rich(), crop=False)


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
