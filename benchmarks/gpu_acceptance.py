"""Acceptance test of a GPU in at most nine minutes: correctness, sampling latency, training speed and memory.

    python benchmarks/gpu_acceptance.py                                  # full-size π₀.₅ on a CUDA device
    python benchmarks/gpu_acceptance.py --device cpu --config small      # test of this script, in seconds

Writes OUT.json and OUT.md, the tables for docs/benchmarks.md. The exit status is the number of failures. Each part has
a share of the budget, and on a GPU its own process, so that an illegal memory access ends only that part. Measurements
that don't fit into the time are skipped and marked in the result. All weights are random, drawn on the device.
"""

import dataclasses
import functools
import gc
import json
import math
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import tyro
from gpu_checks import INTERPRETED, SMALL, Check, engine_checks, kernel_checks, random_weights, training_checks
from gpu_launches import count_launches
from gpu_report import write_report
from torch import Tensor

from torchpi.bench.floor import measure_machine, timed
from torchpi.bench.model import bench_config, describe_machine, make_observation
from torchpi.checkpoints import load_model
from torchpi.checkpoints.checkpoint import open_checkpoint
from torchpi.checkpoints.folder import write_policy_file, write_weights
from torchpi.config import Pi0Config
from torchpi.engine import InferenceEngine
from torchpi.engine.quantize import check_device, quantize_model
from torchpi.engine.runner import Runner
from torchpi.errors import ModelError, UsageError
from torchpi.model.operations import Machine, Workload, sampling_ops, training_ops
from torchpi.model.pi0 import Pi0
from torchpi.model.rtc import ActionPrefix, Guidance, prefix_weights
from torchpi.training.activation_checkpointing import checkpoint_activations, layers
from torchpi.training.config import Checkpointing, TrainConfig
from torchpi.training.distributed import single_process
from torchpi.training.loop import compile_layers, update
from torchpi.training.memory import peak_memory
from torchpi.training.samples import Batch
from torchpi.training.state import TrainState

Row = dict[str, Any]
NUM_STEPS, GRACE = 10, 5.0


@dataclasses.dataclass(frozen=True)
class Part:
    """Settings of a running part, and its deadline."""

    device: torch.device
    config: Pi0Config
    end: float
    """Deadline by `time.time`, which the parent process shares."""

    @property
    def full(self) -> bool:
        """True for full sizes on a GPU, False for a test of this script."""
        return self.device.type == "cuda"

    def row(self, row: Row, work: Callable[[], Row], needs: float) -> Row:
        """Add a row's figures, or the reason why they are missing; `needs` is the estimated time in seconds."""
        left = self.end - time.time()
        if left < needs:
            return row | {"skipped": f"{left:.0f} s left, about {needs:.0f} needed"}
        start = time.time()
        try:
            row |= work()
        except torch.OutOfMemoryError as error:
            row["out_of_memory"] = str(error).partition(". ")[0]
        except Exception as error:
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {error}"[:500]
        return row | {"took_s": time.time() - start}


# ---- correctness and loading ----


def run_checks(part: Part, checks: Iterator[Check]) -> Iterator[Row]:
    """Yield a row per check. A check is skipped if less than twice the time of the slowest one so far is left."""
    slowest = 2.0 if part.full else 0.0
    for name, check in checks:

        def work(check: Any = check) -> Row:
            found, tolerance = check()
            return {"difference": found, "tolerance": tolerance, "passed": found <= tolerance}

        row = part.row({"check": name}, work, needs=2 * slowest)
        slowest = max(slowest, row.get("took_s", 0.0))
        yield row


def kernels_part(part: Part) -> Iterator[Row]:
    """Compare Triton kernels with their plain references."""
    if part.full or INTERPRETED:
        yield from run_checks(part, kernel_checks(part.device, part.full))
    else:
        yield {"check": "Triton kernels", "skipped": "they need a CUDA device, or TRITON_INTERPRET=1"}


def engine_part(part: Part) -> Iterator[Row]:
    """Compare the engine with the plain model, for a small model."""
    yield from run_checks(part, engine_checks(part.device, ("graph", "eager", "compiled") if part.full else ("eager",)))


def training_checks_part(part: Part) -> Iterator[Row]:
    """Compare loss, gradients and updates with the CPU's, for a small model."""
    yield from run_checks(part, training_checks(part.device))


def loading_part(part: Part) -> Iterator[Row]:
    """Time of loading a policy folder's weights in bfloat16, from the disk cache."""

    def work() -> Row:
        with tempfile.TemporaryDirectory(prefix="torchpi_acceptance_") as scratch:
            root, model = pathlib.Path(scratch), make_model(part)
            write_policy_file(root, model, open_checkpoint("demo").spec())
            write_weights(root, model)
            load = functools.partial(load_model, root, dtype=torch.bfloat16, device=part.device)
            seconds = [timed(load, part.device) for _ in range(2)]
            nbytes = sum(parameter.nbytes for parameter in model.parameters())
        return {"seconds": min(seconds), "first_s": seconds[0], "bytes": nbytes}

    yield part.row({"what": "weights, bfloat16"}, work, needs=20 if part.full else 0)


# ---- sampling ----


def make_model(part: Part) -> Pi0:
    """Create a model with random weights in bfloat16."""
    model = Pi0(part.config, device="meta", dtype=torch.bfloat16).to_empty(device=part.device)
    return random_weights(model)


def machine_of(part: Part) -> Machine:
    """Measure peak rates, on a GPU after two warm-ups."""
    measure_now = measure_machine(torch.bfloat16, part.device)
    return [measure_now() for _ in range(3 if part.full else 1)][-1]


def sampling_part(part: Part) -> Iterator[Row]:
    """Measure latency, beginning with the shapes that have a target, in the serving mode."""
    machine = machine_of(part)
    yield {"what": "machine", "flops_per_second": machine.flops, "bytes_per_second": machine.bytes}
    shapes = [(3, 200), (2, 50), (3, 50), (3, 20), (2, 200), (2, 20), (1, 200), (1, 50), (1, 20)]
    modes: Sequence[str] = ("graph", "eager", "fp8", "compiled") if part.full else ("eager", "engine")
    slowest = {mode: (30.0 if mode == "compiled" else 1.0) if part.full else 0.0 for mode in modes}
    for mode in modes:
        try:
            sampler = make_sampler(part, mode)
        except ModelError as error:  # a GPU without fp8
            yield {"mode": mode, "not_available": str(error)}
            continue
        kinds = [(*shape, ()) for shape in (shapes if part.full else shapes[:2])]
        kinds[2:2] = [(3, 200, ("guidance",)), (3, 200, ("action_prefix",))]
        for cameras, tokens, rtc in kinds:
            work = Workload(part.config, 1, cameras, tokens, NUM_STEPS, torch.bfloat16, str(part.device))
            row = {"mode": mode, "cameras": cameras, "tokens": tokens, "kind": rtc[0] if rtc else "plain"}
            measure_row = functools.partial(measure_sampling, part, sampler, work, rtc, machine)
            row = part.row(row, measure_row, needs=1.5 * slowest[mode])
            slowest[mode] = max(slowest[mode], row.get("took_s", 0.0))
            yield row
        del sampler, measure_row  # before the next one is created
        gc.collect()


def make_sampler(part: Part, mode: str) -> Pi0 | InferenceEngine:
    """Create the plain model, or an engine that keeps one bucket, with Triton kernels if it captures graphs."""
    model = make_model(part)
    if mode == "eager":
        return model
    if mode == "fp8":
        check_device("fp8", part.device, emulate_fp8=False)
        example = make_observation(Workload(part.config, 1, 3, 50, NUM_STEPS, torch.bfloat16), part.device)
        quantize_model(model, "fp8", lambda: model.sample_actions(example, num_steps=NUM_STEPS))
    engines: dict[str, Literal["eager", "compiled", "graph"]] = {"engine": "eager", "compiled": "compiled"}
    return InferenceEngine(model, mode=engines.get(mode, "graph"), max_buckets=1)


def measure_sampling(
    part: Part, sampler: Pi0 | InferenceEngine, work: Workload, rtc: Sequence[str], machine: Machine
) -> Row:
    """Measure one shape. The engine reads the observation from the host, as in a policy; the plain model does not."""
    device = part.device
    observation = make_observation(work, device if isinstance(sampler, Pi0) else torch.device("cpu"))
    shape = (1, work.config.require("action_horizon"), work.config.action_dim)
    noise, chunk = (torch.randn(shape, device=device) for _ in range(2))
    delay = torch.full((1,), 5, device=device)
    weight = prefix_weights(shape[1], delay, delay)[:, :, None].expand_as(chunk).contiguous()
    known = (torch.arange(shape[1], device=device) < delay)[None]
    previous = {"guidance": Guidance(chunk, weight), "action_prefix": ActionPrefix(chunk, known)}
    keywords: dict[str, Any] = {"noise": noise, "num_steps": NUM_STEPS, **{name: previous[name] for name in rtc}}
    run, first = functools.partial(sampler.sample_actions, observation, **keywords), list[Tensor]()
    if part.full:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The engine cannot prepare")
        prepare = timed(lambda: first.append(run()), device)
    if not first[0].isfinite().all():
        raise FloatingPointError("The actions are not finite.")
    once = timed(run, device)
    times = sorted(timed(run, device) for _ in range(max(3, min(300, int((2.0 if part.full else 0.05) / once)))))
    row: Row = {"p50_ms": 1e3 * statistics.median(times), "p99_ms": 1e3 * times[math.ceil(0.99 * len(times)) - 1]}
    row["implementation"] = "plain" if isinstance(sampler, Pi0) else sampler.metadata["kernels"]
    row |= {"runs": len(times), "prepare_s": max(0.0, prepare - once)}
    if part.full:
        row["peak_bytes"] = torch.cuda.max_memory_allocated(device)
        row["launches"] = count_kernels(run)
    if rtc:
        return row
    floor = sum(op.floor(machine) for op in sampling_ops(work))
    row |= {"floor_ms": 1e3 * floor, "ratio": row["p50_ms"] / (1e3 * floor)}
    if isinstance(sampler, Pi0):
        return row | plain_breakdown(sampler, observation, noise, device)
    (runner,) = sampler._runners.values()
    return row | engine_breakdown(runner, row["p50_ms"], device)


def count_kernels(run: Callable[[], Any]) -> int:
    """Number of kernels that the device ran, without copies."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_device)


def median_ms(run: Callable[[], Any], device: torch.device, runs: int = 11) -> float:
    """Milliseconds of a run after a warm-up."""
    run()
    return 1e3 * statistics.median(timed(run, device) for _ in range(runs))


@torch.no_grad()
def plain_breakdown(model: Pi0, observation: Any, noise: Tensor, device: torch.device) -> Row:
    """Time vision, prefill and steps of the plain model separately."""
    images = torch.cat(list(observation.images.values()))
    prefix = model.embed_prefix(observation, drop_padding=True)
    cache = model.prefill(observation, prefix, no_padding=True)
    parts = {
        "vision_ms": lambda: model.vision(images, model.compute_dtype),
        "prefill_ms": lambda: model.prefill(observation, prefix, no_padding=True),
        "steps_ms": lambda: model.denoise(cache, noise[:, None], num_steps=NUM_STEPS),
    }
    return {name: median_ms(run, device, 3) for name, run in parts.items()}


@torch.no_grad()
def engine_breakdown(runner: Runner, whole_ms: float, device: torch.device) -> Row:
    """Time the runner's vision and prefill separately; steps and copies are the remainder of the total."""
    inputs, horizon = runner.inputs, runner.bucket.horizon

    def prefill() -> Any:
        return runner.prefill(inputs.images, inputs.tokens, inputs.valid, inputs.state, horizon)

    def vision() -> Any:
        return runner.packed.embed_images(inputs.images)

    if runner.graph is not None:
        vision, prefill = captured(vision), captured(prefill)
    both = median_ms(prefill, device)
    if runner.graph is None and device.type == "cuda":  # compiled as one graph
        return {"vision_ms": None, "prefill_ms": both, "steps_ms": whole_ms - both}
    alone = median_ms(vision, device)
    return {"vision_ms": alone, "prefill_ms": both - alone, "steps_ms": whole_ms - both}


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """Capture a run as a CUDA graph."""
    run()  # the kernels are already compiled, because the runner has been captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()
    return lambda kept=kept: graph.replay()  # the graph owns the results' memory


# ---- training ----


def training_part(part: Part) -> Iterator[Row]:
    """Measure bfloat16 updates with float32 weights, with more activation checkpointing if the memory is exceeded."""
    model = Pi0(part.config, device="meta", compute_dtype=torch.bfloat16).to_empty(device=part.device)
    state = TrainState.create(random_weights(model).train(), weight_decay=1e-10, ema=True)
    machine = machine_of(part)
    slowest, fitting = (8.0 if part.full else 0.0), dict[int, Checkpointing]()
    kinds: Sequence[Checkpointing] = ("none", "selective", "full")

    def measured(batch: int, kind: Checkpointing, compiled: bool = False) -> Row:
        row: Row = {"batch": batch, "checkpointing": kind, "compiled": compiled}
        work = functools.partial(measure_training, part, model, state, machine, row)
        return part.row(row, work, needs=4 * slowest if compiled else 1.5 * slowest)

    batches = (32, 16, 8) if part.full else (2,)
    for batch in batches:
        for kind in kinds:
            found = measured(batch, kind)
            slowest = max(slowest, found.get("took_s", 0.0))
            yield found
            gc.collect()
            if "out_of_memory" not in found:
                fitting[batch] = kind
                break
    if part.full and batches[0] in fitting:
        yield measured(batches[0], fitting[batches[0]], compiled=True)


def measure_training(part: Part, model: Pi0, state: TrainState, machine: Machine, row: Row) -> Row:
    """Measure a row's batch size with three cameras and prompts of maximum length."""
    device, batch, kind = part.device, row["batch"], row["checkpointing"]
    config = TrainConfig(batch_size=batch).replace(activation_checkpointing=kind)
    meta = Pi0(part.config, device="meta", compute_dtype=torch.bfloat16)
    plan = peak_memory(meta, config, ("a", "b", "c"), world_size=1, shards=1, device=device.type)
    row["plan_bytes"] = plan.total  # even if the memory is exceeded
    work = Workload(part.config, batch, 3, part.config.require("max_token_len"), 1, torch.bfloat16, str(device))
    observation = make_observation(work, device, padded=False)
    noise = torch.randn(batch, 1, part.config.require("action_horizon"), part.config.action_dim, device=device)
    is_real = torch.ones_like(noise[:, 0], dtype=torch.bool)
    data = Batch(observation, noise[:, 0], is_real, noise, torch.rand(batch, 1, device=device), indices=())
    state.optimizer.zero_grad()
    for layer in layers(model):
        layer.__dict__.pop("forward", None)  # of the previous row
    checkpoint_activations(model, kind)
    if row["compiled"]:
        compile_layers(model)
    if part.full:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    run = functools.partial(update, state, config, [data], single_process(model))
    first, once = timed(run, device), timed(run, device)
    seconds = statistics.median(timed(run, device) for _ in range(max(3, min(15, int(4 / once))) if part.full else 1))
    ops = training_ops(work)
    row |= {"samples_per_second": batch / seconds, "seconds": seconds, "first_s": first}
    row["mfu"] = sum(op.flops for op in ops) / seconds / machine.flops
    row["ratio"] = seconds / sum(op.floor(machine) for op in ops)
    return {"peak_bytes": torch.cuda.max_memory_allocated(device)} if part.full else {}


def launches_part(part: Part) -> Iterator[Row]:
    """Count the launches per sampling with three cameras by operation, from the sizes alone."""

    def work() -> Row:
        sizes = Workload(part.config, 1, 3, 200, NUM_STEPS, torch.bfloat16)
        counts = {name: count_launches(sizes, engine=name == "engine") for name in ("plain", "engine")}
        return {name: {"launches": total, "by_operation": by} for name, (total, by) in counts.items()}

    yield part.row({"what": "launches"}, work, needs=0)


# ---- budget ----

PARTS: Mapping[str, tuple[float, Callable[[Part], Iterator[Row]]]] = {
    "kernels": (80, kernels_part),
    "engine": (80, engine_part),
    "training checks": (20, training_checks_part),
    "loading": (40, loading_part),
    "sampling": (200, sampling_part),
    "training": (110, training_part),
    "launches": (10, launches_part),
}
"""Share of the budget and function of each part, in this order; unused time goes to the following parts."""


def run_part(name: str, device: str, config: str, end: float, rows: pathlib.Path) -> None:
    """Run a part in this process, and append its rows to a file."""
    part = Part(torch.device(device), SMALL if config == "small" else bench_config(config), end)
    for row in PARTS[name][1](part):
        print(name, {key: value for key, value in row.items() if not isinstance(value, dict)}, file=sys.stderr)
        append_row(rows, {"part": name, **row})


def append_row(rows: pathlib.Path, row: Row) -> None:
    with rows.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def run_isolated(name: str, device: str, config: str, end: float, rows: pathlib.Path) -> None:
    """Run a part in its own process; append a row if the process fails or exceeds its time."""
    options = {"device": device, "config": config, "part": name, "end": end, "out": rows}
    process = subprocess.Popen([sys.executable, __file__, *(f"--{key}={value}" for key, value in options.items())])
    try:
        status = process.wait(max(end - time.time(), 0) + GRACE)
        if status:
            append_row(rows, {"part": name, "check": "process", "error": f"It ended with status {status}."})
    except subprocess.TimeoutExpired:
        append_row(rows, {"part": name, "check": "the rest", "skipped": "the part's time was exceeded"})
    finally:
        process.kill()
        process.wait()


def main(
    device: str = "cuda",
    config: str = "pi05",
    budget: float = 540.0,
    out: pathlib.Path = pathlib.Path("gpu_acceptance"),
    part: str | None = None,
    end: float = 0.0,
) -> int:
    """Run all parts and write OUT.json and OUT.md, which are updated after each part.

    Args:
        device: "cuda" or "cpu"; on a CPU there are no graphs and Triton kernels, and few shapes.
        config: preset, mid, small or a JSON file.
        budget: time limit in seconds.
        out: name of the output files without extension.
        part: run only this part and append its rows to OUT; used by the script itself.
        end: deadline of that part as Unix time.
    """
    if part is not None:
        run_part(part, device, config, end, out)
        return 0
    if device != "cpu" and not torch.cuda.is_available():
        raise UsageError(f"No CUDA device was found for --device {device}; --device cpu --config small needs none.")
    start, failed = time.time(), 0
    document: dict[str, Any] = {"machine": describe_machine(torch.device(device)), "device": device, "config": config}
    document["command"] = f"python benchmarks/gpu_acceptance.py --device {device} --config {config}"
    with tempfile.TemporaryDirectory() as scratch:
        rows, names = pathlib.Path(scratch) / "rows.jsonl", list(PARTS)
        rows.touch()
        for i, name in enumerate(names):
            left = start + budget - 2 * GRACE - time.time()
            share = PARTS[name][0] / sum(PARTS[each][0] for each in names[i:])
            (run_part if device == "cpu" else run_isolated)(name, device, config, time.time() + share * left, rows)
            document["rows"] = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
            document["seconds"] = time.time() - start
            failed = write_report(document, out)
    print(f"{failed} failures; {out}.md and {out}.json", file=sys.stderr)
    return min(failed, 99)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
