"""PyTorch's threads on a CPU that other programs use too.

At the end of each operation the threads wait for each other, and libgomp lets them spin meanwhile. On a busy core that
keeps the one that everybody waits for from running: a chunk took 3 to 5 times as long as on quiet cores, and 10 times
in bad moments (docs/benchmarks.md). Spinning for a moment only, and a single thread for a small model, cost little.
"""

import os
from typing import Any

SPIN_COUNT = "5000"
"""Rounds until a waiting thread sleeps; libgomp's default is millions."""
SMALL_MODEL = 10_000_000
"""Parameters below which one thread is about as fast as two."""


def spin_briefly() -> None:
    """Let waiting threads sleep soon, unless the user's environment decides; takes effect before torch is imported."""
    if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def limit_threads(model: Any) -> None:
    """Run a small model on a CPU with one thread in this process, unless the user's environment decides."""
    if model.device.type != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return
    if sum(parameter.numel() for parameter in model.parameters()) < SMALL_MODEL:
        import torch

        torch.set_num_threads(1)
