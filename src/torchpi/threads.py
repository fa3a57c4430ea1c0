"""Settings of PyTorch's CPU threads for a machine that runs other programs too.

At the end of each operation the threads wait for each other, and libgomp lets them spin. On a busy core a spinning
thread blocks the one that all wait for: inference took 3 to 5 times, at worst 10 times, as long as on an idle machine
(docs/benchmarks.md). A short spin, and a single thread for a small model, cost little.
"""

import os
from typing import Any

SPIN_COUNT = "5000"
"""Spin iterations before a waiting thread sleeps; libgomp's default is millions."""
SMALL_MODEL = 10_000_000
"""Number of parameters below which one thread is about as fast as two."""


def spin_briefly() -> None:
    """Let waiting threads sleep early, unless the environment sets this. Call it before torch is imported."""
    if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def limit_threads(model: Any) -> None:
    """Use a single thread in this process for a small model on the CPU, unless the environment sets the number."""
    if model.device.type != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return
    if sum(parameter.numel() for parameter in model.parameters()) < SMALL_MODEL:
        import torch

        torch.set_num_threads(1)
