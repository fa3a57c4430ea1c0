"""Loading and converting a checkpoint: time beside that of reading its bytes, and memory. Each in a fresh process."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable

import torch

from torchpi.checkpoints.folder import write_weights
from torchpi.checkpoints.load import existing_folder, load_model, open_checkpoint
from torchpi.config import Pi0Config
from torchpi.errors import UsageError
from torchpi.model.pi0 import Pi0

_BLOCK = 1 << 26


@dataclasses.dataclass(frozen=True)
class LoadResult:
    """What loading a checkpoint took, or loading it and writing its weights into a policy folder."""

    seconds: float
    floor: float
    """Seconds of reading the same arrays (through tensorstore, or the files' bytes), and writing their bytes."""
    model_bytes: int
    peak_rss: int
    """Above what the process had before: all resident pages, those of mapped files included."""
    peak_anonymous: int
    """The same without mapped files, whose pages the system may drop."""


def bench_load(path: str, dtype: torch.dtype, *, config: str | None = None, convert: bool = False) -> LoadResult:
    """Load a model in a fresh process and watch its memory (Linux); twice, the first time warms the disk's cache.

    Args:
        config: see `load_model`.
        convert: write its weights into a policy folder as well, in a temporary folder beside the checkpoint.
    """
    place = existing_folder(path).resolve().parent if convert else None
    with tempfile.TemporaryDirectory(dir=place, prefix=".torchpi_bench_") as scratch:
        arguments = [path, str(dtype).removeprefix("torch."), config or "", scratch if convert else ""]
        floor = [_in_fresh_process("floor", arguments)["seconds"] for _ in range(2)][-1]
        found = _in_fresh_process("load", arguments)
    sizes = {name: int(found[name]) for name in ("model_bytes", "peak_rss", "peak_anonymous")}
    return LoadResult(found["seconds"], floor, **sizes)


def _in_fresh_process(what: str, arguments: list[str]) -> dict[str, float]:
    command = [sys.executable, "-m", "torchpi.bench.loading", what, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"loading {arguments[0]} failed: {done.stderr.strip().splitlines()[-1]}.")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run_bench_load(path: str, *, dtype: str, config: str | None, as_json: bool) -> None:
    """Load a policy or checkpoint, then convert it, and print time and peak memory."""
    results = {}
    for what in ("load", "convert"):
        result = bench_load(path, getattr(torch, dtype), config=config, convert=what == "convert")
        results[what] = dataclasses.asdict(result)
        size = result.model_bytes
        print(
            f"{what} {path}: {result.seconds:.2f} s, {result.seconds / result.floor:.2f} × its floor of "
            f"{result.floor:.2f} s; model {size / 1e9:.3f} GB in {dtype}; peak {result.peak_anonymous / size:.2f} × "
            f"that in memory of its own, {result.peak_rss / size:.2f} × with mapped files",
            file=sys.stderr if as_json else sys.stdout,
        )
    if as_json:
        print(json.dumps(results))


def _load(path: str, dtype: torch.dtype, config: str | None, out: pathlib.Path | None) -> int:
    model = load_model(path, config=config, dtype=dtype)
    if out is not None:
        write_weights(out, model)
    return sum(parameter.nbytes for parameter in model.parameters())


def _floor(path: str, dtype: torch.dtype, config: str | None, out: pathlib.Path | None) -> int:
    """Read what `_load` reads, as its library does it fastest, and write as many bytes as it writes."""
    checkpoint = open_checkpoint(existing_folder(path), config=config)
    files = sorted(checkpoint.root.glob("*.safetensors"))
    for file in files:
        with file.open("rb", buffering=0) as content:
            buffer = bytearray(_BLOCK)
            while content.readinto(buffer):
                pass
    for name in () if files else checkpoint.arrays.shapes:
        checkpoint.arrays.read(name)
    if out is None:
        return 0
    block = bytes(_BLOCK)
    with (out / "floor").open("wb", buffering=0) as target:
        left = _num_parameters(checkpoint.config) * dtype.itemsize
        while left > 0:
            left -= target.write(block[: min(left, _BLOCK)])
    (out / "floor").unlink()
    return 0


def _num_parameters(config: Pi0Config) -> int:
    return sum(parameter.numel() for parameter in Pi0(config, device="meta").parameters())


def _resident(field: str) -> int:
    with pathlib.Path("/proc/self/status").open(encoding="utf-8") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def _watched(work: Callable[[], int]) -> dict[str, float]:
    before, peak, done = (_resident("VmRSS"), _resident("RssAnon")), [0, 0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[:] = max(peak[0], _resident("VmRSS")), max(peak[1], _resident("RssAnon"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = time.perf_counter()
    size = work()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return {
        "seconds": seconds,
        "model_bytes": size,
        "peak_rss": peak[0] - before[0],
        "peak_anonymous": peak[1] - before[1],
    }


def _main(what: str, path: str, dtype: str, config: str, out: str) -> None:
    import safetensors
    import tensorstore

    del safetensors, tensorstore  # imported before the clock starts
    work = {"load": _load, "floor": _floor}[what]
    target = pathlib.Path(out) if out else None
    print(json.dumps(_watched(lambda: work(path, getattr(torch, dtype), config or None, target))))


if __name__ == "__main__":
    _main(*sys.argv[1:])
