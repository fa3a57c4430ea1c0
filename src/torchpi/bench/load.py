"""`bench load`: time and memory of loading and converting a checkpoint, each in a fresh process."""

import concurrent.futures
import importlib
import multiprocessing
import pathlib
import sys
import tempfile
import threading
import time
from collections.abc import Callable

import psutil
import torch

from torchpi.checkpoints import load_model
from torchpi.checkpoints.address import existing_folder
from torchpi.checkpoints.checkpoint import open_checkpoint
from torchpi.checkpoints.folder import write_weights
from torchpi.model.pi0 import Pi0
from torchpi.ui.format import print_json

_BLOCK = 1 << 26


def run_bench_load(path: str, *, dtype: str, config: str | None, as_json: bool) -> None:
    """Load a policy or checkpoint, then convert it, and print time and peak memory.

    The floor reads the same arrays (through tensorstore, or the files' bytes), and for converting writes as many bytes.
    """
    results = {}
    for what in ("load", "convert"):
        parent = existing_folder(path).resolve().parent if what == "convert" else None  # on the checkpoint's disk
        with tempfile.TemporaryDirectory(dir=parent, prefix=".torchpi_bench_") as scratch:
            arguments = (path, getattr(torch, dtype), config, pathlib.Path(scratch) if what == "convert" else None)
            measure(_floor, *arguments)  # warms the disk's cache
            floor = measure(_floor, *arguments)["seconds"]
            found = results[what] = {**measure(_load, *arguments), "floor": floor}
        size = found["model_bytes"]
        print(
            f"{what} {path}: {found['seconds']:.2f} s, {found['seconds'] / floor:.2f} × its floor of {floor:.2f} s; "
            f"model {size / 1e9:.3f} GB in {dtype}; peak {found['peak_anonymous'] / size:.2f} × that of its own, "
            f"{found['peak_rss'] / size:.2f} × with mapped files",
            file=sys.stderr if as_json else sys.stdout,
        )
    if as_json:
        print_json(results)


def measure(work: Callable[..., int], *arguments: object) -> dict[str, int | float]:
    """Run a function that returns a model's bytes in a fresh process: its time, wall clock and CPU, and peak memory."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_watched, work, *arguments).result()


def _watched(work: Callable[..., int], *arguments: object) -> dict[str, int | float]:
    for module in ("safetensors", "tensorstore"):  # before the clock starts
        importlib.import_module(module)
    before, found, done = _memory(), [_memory()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            found.append(_memory())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start, cpu = time.perf_counter(), time.process_time()
    size = work(*arguments)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    done.set()
    watcher.join()
    rss, anonymous = (max(each) - least for each, least in zip(zip(*found, strict=True), before, strict=True))
    return {"seconds": seconds, "cpu": cpu, "model_bytes": size, "peak_rss": rss, "peak_anonymous": anonymous}


def _memory() -> tuple[int, int]:
    """Resident bytes of this process, and those that are not of files."""
    info = psutil.Process().memory_info()
    return info.rss, info.rss - getattr(info, "shared", 0)  # only Linux tells


def _load(path: str, dtype: torch.dtype, config: str | None, out: pathlib.Path | None) -> int:
    model = load_model(path, config=config, dtype=dtype)
    if out is not None:
        write_weights(out, model)
    return sum(parameter.nbytes for parameter in model.parameters())


def _floor(path: str, dtype: torch.dtype, config: str | None, out: pathlib.Path | None) -> int:
    """Read the arrays that `_load` reads, as their library does it fastest, and write as many bytes as it writes."""
    checkpoint = open_checkpoint(path, config=config)
    files = sorted(checkpoint.root.glob("*.safetensors"))
    buffer = memoryview(bytearray(_BLOCK))
    for file in files:
        with file.open("rb", buffering=0) as content:
            while content.readinto(buffer):
                pass
    for name in () if files else checkpoint.arrays.shapes:
        checkpoint.arrays.read(name)
    size = sum(parameter.numel() for parameter in Pi0(checkpoint.config, device="meta").parameters()) * dtype.itemsize
    if out is not None:
        with (out / "floor").open("wb", buffering=0) as target:
            left = size
            while left > 0:
                left -= target.write(buffer[:left])
        (out / "floor").unlink()
    return size
