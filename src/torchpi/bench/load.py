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

    The floor is the time to read the same arrays (with tensorstore) or files, and to write as many bytes.
    """
    results = {}
    for operation in ("load", "convert"):
        is_convert = operation == "convert"
        parent = existing_folder(path).resolve().parent if is_convert else None  # on the checkpoint's disk
        with tempfile.TemporaryDirectory(dir=parent, prefix=".torchpi_bench_") as scratch:
            arguments = (path, getattr(torch, dtype), config, pathlib.Path(scratch) if is_convert else None)
            measure(_floor, *arguments)  # warms up the disk cache
            floor = measure(_floor, *arguments)["seconds"]
            result = results[operation] = {**measure(_load, *arguments), "floor": floor}
        seconds, size = result["seconds"], result["model_bytes"]
        print(
            f"{operation} {path}: {seconds:.2f} s, {seconds / floor:.2f} × its floor of {floor:.2f} s; "
            f"model {size / 1e9:.3f} GB in {dtype}; peak memory {result['peak_anonymous'] / size:.2f} × the model, "
            f"{result['peak_rss'] / size:.2f} × with mapped files",
            file=sys.stderr if as_json else sys.stdout,
        )
    if as_json:
        print_json(results)


def measure(work: Callable[..., int], *arguments: object) -> dict[str, int | float]:
    """Measure time and peak memory of a function in a fresh process; the function returns a model's size in bytes."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_measure, work, *arguments).result()


def _measure(work: Callable[..., int], *arguments: object) -> dict[str, int | float]:
    for module in ("safetensors", "tensorstore"):  # import time is not measured
        importlib.import_module(module)
    rss_before, anonymous_before = _memory()
    samples, done = [_memory()], threading.Event()

    def sample_memory() -> None:
        while not done.wait(0.002):
            samples.append(_memory())

    sampler = threading.Thread(target=sample_memory, daemon=True)
    sampler.start()
    start, cpu_start = time.perf_counter(), time.process_time()
    size = work(*arguments)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    done.set()
    sampler.join()
    return {
        "seconds": seconds,
        "cpu": cpu,
        "model_bytes": size,
        "peak_rss": max(rss for rss, _ in samples) - rss_before,
        "peak_anonymous": max(anonymous for _, anonymous in samples) - anonymous_before,
    }


def _memory() -> tuple[int, int]:
    """Resident bytes of this process, in total and without mapped files."""
    info = psutil.Process().memory_info()
    return info.rss, info.rss - getattr(info, "shared", 0)  # only Linux reports shared pages


def _load(path: str, dtype: torch.dtype, config: str | None, out: pathlib.Path | None) -> int:
    model = load_model(path, config=config, dtype=dtype)
    if out is not None:
        write_weights(out, model)
    return sum(parameter.nbytes for parameter in model.parameters())


def _floor(path: str, dtype: torch.dtype, config: str | None, out: pathlib.Path | None) -> int:
    """Read the same data as `_load` in the fastest way, and write as many bytes."""
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
            remaining = size
            while remaining > 0:
                remaining -= target.write(buffer[:remaining])
        (out / "floor").unlink()
    return size
