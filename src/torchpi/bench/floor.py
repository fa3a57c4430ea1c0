"""Floor of a workload, the time that its operations need at the machine's peak, compared with the measured time.

The floor of an operation is the larger of FLOPs / peak and bytes / bandwidth. The same run measures the peak with a
large matmul in the same dtype, and the bandwidth with a large copy. `model.operations` counts FLOPs and bytes.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.console import Console

from torchpi.model.operations import Machine, Op, Workload
from torchpi.ui.tables import Column, Table


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of a benchmark: medians over its repeats."""

    name: str
    seconds: float
    floor: float
    """Floor in seconds."""
    ratio: float
    """Time divided by the floor at the machine's speed in the same repeat."""
    operations: list[Op]
    machine: Machine
    busy_seconds: float | None = None
    """Time while other processes kept all cores busy, if measured."""

    def to_json(self) -> dict[str, Any]:
        """JSON document."""
        rates = {"flops_per_second": self.machine.flops, "bytes_per_second": self.machine.bytes}
        times = {"seconds": self.seconds, "floor": self.floor, "ratio": self.ratio}
        if self.busy_seconds is not None:
            times["busy_seconds"] = self.busy_seconds
        return {"name": self.name, **times, **rates}

    def print(self, console: Console) -> None:
        """Print the result, and a table of the floor per operation."""
        console.print(
            f"\n[bold]{self.name}[/bold]: {1e3 * self.seconds:.1f} ms, floor {1e3 * self.floor:.1f} ms, ratio "
            f"{self.ratio:.2f} (this run: {self.machine.flops / 1e9:.0f} GFLOP/s, {self.machine.bytes / 1e9:.1f} GB/s)"
        )
        if self.busy_seconds is not None:
            slowdown = self.busy_seconds / self.seconds
            console.print(f"with all cores busy: {1e3 * self.busy_seconds:.1f} ms, {slowdown:.2f} times as long")
        totals: dict[str, np.ndarray] = {}  # FLOPs, bytes and floor by name
        for op in self.operations:
            costs = np.array([op.flops, op.bytes, op.floor(self.machine)])
            totals[op.name] = totals.get(op.name, np.zeros(3)) + costs
        rows = [
            (name, f"{flops / 1e9:.2f}", f"{size / 1e9:.3f}", f"{1e3 * floor:.2f}", f"{100 * floor / self.floor:.1f} %")
            for name, (flops, size, floor) in sorted(totals.items(), key=lambda item: -item[1][2])
        ]
        columns = [Column("operation"), *(Column(title, "number") for title in ("GFLOP", "GB", "floor ms", "share"))]
        console.print(Table(columns, rows).to_rich(), crop=False)


def measure(name: str, run: Callable[[], Any], operations: list[Op], work: Workload, repeats: int) -> Result:
    """Time a workload and the machine alternately, because the speed of a shared machine drifts within seconds."""
    device = torch.device(work.device)
    measure_peak = measure_machine(work.dtype, device)
    for _ in range(2):  # warm-up
        measure_peak()
        run()
    machines, times, floors = [], [], []
    for _ in range(repeats):
        machines.append(measure_peak())
        floors.append(sum(op.floor(machines[-1]) for op in operations))
        times.append(timed(run, device))
    ratios = [seconds / floor for seconds, floor in zip(times, floors, strict=True)]
    machine = Machine(*(statistics.median(getattr(m, field) for m in machines) for field in ("flops", "bytes")))
    return Result(
        name, statistics.median(times), statistics.median(floors), statistics.median(ratios), operations, machine
    )


def measure_machine(dtype: torch.dtype, device: torch.device) -> Callable[[], Machine]:
    """Function that measures the peak of a large matmul and the bandwidth of a large copy, each the best of three."""
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
    """Duration of one run in seconds."""
    synchronize = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start
