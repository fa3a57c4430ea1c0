"""Benchmarks: what was measured, beside the floor that the machine allows in the same run.

The floor of an operation is the larger of FLOPs / peak and bytes / bandwidth, with the peak of a large matmul in the
same dtype and the bandwidth of a large copy, both measured just before. Matrix and attention products count their
operands and results once; each normalization, softmax, activation and residual counts one read and one write of its
tensors. Dead code behind the last prefix layer's keys and values is left out, padding is dropped, and the time
conditioning of all steps is computed once. A training step is three times the forward pass and the optimizer's bytes.
"""

import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from torchpi.config import PRESETS, GemmaConfig, Pi0Config, VisionConfig, preset
from torchpi.errors import UsageError
from torchpi.model.pi0 import Pi0
from torchpi.training.config import TrainConfig
from torchpi.training.distributed import alone
from torchpi.training.loop import update
from torchpi.training.memory import layers
from torchpi.training.samples import Batch
from torchpi.training.state import TrainState
from torchpi.types import Observation

# A model that two CPU cores run in a second: big enough that matmuls dominate, as they do at full size.
MID = Pi0Config(
    pi05=True,
    paligemma_variant=GemmaConfig(width=512, depth=6, mlp_dim=2048, num_heads=8, num_kv_heads=1, head_dim=64),
    action_expert_variant=GemmaConfig(width=256, depth=6, mlp_dim=1024, num_heads=8, num_kv_heads=1, head_dim=64),
    siglip_variant=VisionConfig(width=384, depth=6, mlp_dim=1536, num_heads=6, patch=14),
    vocab_size=8192,
)
# Master weight read and written, gradient read, both moments read and written; float32.
ADAMW_BYTES_PER_PARAMETER = 4 * (2 + 1 + 4)


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is run: sizes of one call."""

    config: Pi0Config
    batch: int
    num_cameras: int
    prompt_tokens: int
    """Real tokens of the prompt; it is padded to the config's max_token_len."""
    num_steps: int
    dtype: torch.dtype
    device: str = "cpu"
    num_draws: int = 1
    """Draws of noise and time per sample, in training."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """What this machine reaches, measured in this run."""

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
    """Lists the operations of a model part by part, in the dtype's element size."""

    def __init__(self, part: str, size: int) -> None:
        self.part, self.size = part, size

    def matmul(self, name: str, rows: int, num_in: int, num_out: int) -> Op:
        elements = rows * num_in + num_in * num_out + rows * num_out
        return Op(f"{self.part} {name}", 2 * rows * num_in * num_out, self.size * elements)

    def elementwise(self, name: str, elements: int) -> Op:
        return Op(f"{self.part} {name}", 0, 2 * self.size * elements)

    def attention(self, batch: int, queries: int, keys: int, heads: int, kv_heads: int, dim: int) -> Iterator[Op]:
        elements = 2 * batch * queries * heads * dim + 2 * batch * keys * kv_heads * dim
        yield Op(f"{self.part} attention", 4 * batch * queries * keys * heads * dim, self.size * elements)
        yield self.elementwise("softmax", batch * heads * queries * keys)


def vision_ops(work: Workload) -> Iterator[Op]:
    """SigLIP over all cameras."""
    vit, patches = work.config.siglip, work.config.num_patches
    images = work.batch * work.num_cameras
    rows, width = images * patches, vit.width
    count = _Counter("vision", work.dtype.itemsize)
    yield _Counter("vision", 4).matmul("patch embedding", rows, 3 * vit.patch**2, width)
    for _ in range(vit.depth):
        yield count.elementwise("norm", 2 * rows * width)
        yield count.matmul("qkv", rows, width, 3 * width)
        yield from count.attention(images, patches, patches, vit.num_heads, vit.num_heads, width // vit.num_heads)
        yield count.matmul("attention out", rows, width, width)
        yield count.matmul("mlp", rows, width, vit.mlp_dim)
        yield count.elementwise("activation", rows * vit.mlp_dim)
        yield count.matmul("mlp", rows, vit.mlp_dim, width)
        yield count.elementwise("residual", 2 * rows * width)
    yield count.elementwise("norm", rows * width)
    yield count.matmul("head", rows, width, work.config.paligemma.width)


def _layer_ops(count: _Counter, gemma: GemmaConfig, batch: int, tokens: int, past: int) -> Iterator[Op]:
    rows, width, dim = batch * tokens, gemma.width, gemma.head_dim
    heads, kv_heads = gemma.num_heads, gemma.num_kv_heads
    yield count.elementwise("norm", 2 * rows * width)
    yield count.matmul("qkv", rows, width, (heads + 2 * kv_heads) * dim)
    yield from count.attention(batch, tokens, past + tokens, heads, kv_heads, dim)
    yield count.matmul("attention out", rows, heads * dim, width)
    yield count.matmul("mlp", rows, width, 2 * gemma.mlp_dim)
    yield count.elementwise("activation", rows * gemma.mlp_dim)
    yield count.matmul("mlp", rows, gemma.mlp_dim, width)
    yield count.elementwise("residual", 2 * rows * width)


def prefix_ops(work: Workload) -> Iterator[Op]:
    """The backbone over the real prefix tokens, up to the last layer's keys and values."""
    gemma = work.config.paligemma
    tokens = work.num_cameras * work.config.num_patches + work.prompt_tokens
    rows = work.batch * tokens
    count = _Counter("prefix", work.dtype.itemsize)
    for _ in range(gemma.depth - 1):
        yield from _layer_ops(count, gemma, work.batch, tokens, 0)
    yield count.elementwise("norm", rows * gemma.width)
    yield count.matmul("qkv", rows, gemma.width, 2 * gemma.num_kv_heads * gemma.head_dim)


def expert_ops(work: Workload, num_steps: int) -> Iterator[Op]:
    """The action expert, all steps, and the time conditioning, once."""
    config, expert = work.config, work.config.action_expert
    horizon = config.require("action_horizon")
    tokens = horizon if config.pi05 else horizon + 1
    prefix = work.num_cameras * config.num_patches + work.prompt_tokens
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
            yield from _layer_ops(count, expert, work.batch, tokens, prefix)
        yield count.elementwise("norm", rows * width)
        yield exact.matmul("projections", work.batch * horizon, width, config.action_dim)


def sampling_ops(work: Workload) -> list[Op]:
    """All operations of `sample_actions`."""
    return [*vision_ops(work), *prefix_ops(work), *expert_ops(work, work.num_steps)]


def training_ops(work: Workload) -> list[Op]:
    """All operations of a training step: forward, backward at twice the forward, AdamW."""
    # Each draw is a suffix behind the same prefix.
    suffixes = dataclasses.replace(work, batch=work.batch * work.num_draws)
    forward = [*vision_ops(work), *prefix_ops(work), *expert_ops(suffixes, num_steps=1)]
    parameters = sum(parameter.numel() for parameter in Pi0(work.config, device="meta").parameters())
    both = [Op(op.name, 3 * op.flops, 3 * op.bytes) for op in forward]
    return [*both, Op("optimizer AdamW", 0, ADAMW_BYTES_PER_PARAMETER * parameters)]


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
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_observation(work: Workload, device: torch.device, *, padded: bool = True) -> Observation:
    """A batch of random images and a prompt of the workload's length, padded as a policy's is."""
    generator = torch.Generator().manual_seed(0)
    config = work.config
    size, length = config.image_size, config.require("max_token_len") if padded else work.prompt_tokens
    images = {
        f"camera_{i}": torch.randint(0, 256, (work.batch, size, size, 3), dtype=torch.uint8, generator=generator)
        for i in range(work.num_cameras)
    }
    real = torch.arange(length) < work.prompt_tokens
    return Observation.from_dict(
        {
            "image": images,
            "state": torch.zeros(work.batch, config.action_dim),
            "tokenized_prompt": torch.randint(0, config.vocab_size, (work.batch, length), generator=generator),
            "tokenized_prompt_mask": real.expand(work.batch, length),
        }
    ).to(device)


@dataclasses.dataclass(frozen=True)
class Result:
    """One benchmark: what was measured, and the floor in the same run. Medians over the repeats."""

    name: str
    seconds: float
    floor: float
    """Seconds."""
    ratio: float
    """Of the pairs: each run's time over the floor at the machine's speed just then."""
    operations: list[Op]
    machine: Machine


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


def bench_model(work: Workload, *, repeats: int = 5, compiled: bool = False) -> Result:
    """`sample_actions`."""
    model = Pi0(work.config, device=work.device).to(work.dtype).eval()
    observation = make_observation(work, torch.device(work.device))
    horizon = work.config.require("action_horizon")
    noise = torch.randn(work.batch, horizon, work.config.action_dim, device=work.device)
    if compiled:
        compile_stacks(model)

    def run() -> None:
        model.sample_actions(observation, noise=noise, num_steps=work.num_steps)

    return measure("sample_actions", run, sampling_ops(work), work, repeats)


def compile_stacks(model: Pi0) -> None:
    """Compile what sampling runs of the three stacks: of the backbone that is `keys_and_values`, not `forward`."""
    model.vision.compile()
    model.backbone.keys_and_values = torch.compile(model.backbone.keys_and_values)  # type: ignore[method-assign]
    model.expert.compile()


def bench_train(work: Workload, *, repeats: int = 5, compiled: bool = False) -> Result:
    """One update as `torchpi train` does it: float32 weights, the workload's dtype in the matmuls, AdamW, average.

    Args:
        compiled: each layer through torch.compile, as the recipe's `compile`.
    """
    model = Pi0(work.config, device=work.device, compute_dtype=work.dtype)
    if compiled:
        for layer in layers(model):
            layer.compile()
    config = TrainConfig(num_draws=work.num_draws, batch_size=work.batch)
    state = TrainState.begin(model, weight_decay=config.weight_decay, ema=True)
    device = torch.device(work.device)
    shape = (work.batch, work.num_draws, work.config.require("action_horizon"), work.config.action_dim)
    generator = torch.Generator(device).manual_seed(0)
    noise = torch.randn(shape, generator=generator, device=device)
    time_ = torch.rand(shape[:2], generator=generator, device=device)
    # The trainer drops padding that all samples of a batch have.
    observation = make_observation(work, device, padded=False)
    batch = Batch(observation, noise[:, 0], torch.ones_like(noise[:, 0], dtype=torch.bool), noise, time_, places=())
    parallel = alone(model)
    return measure("training step", lambda: update(state, config, [batch], parallel), training_ops(work), work, repeats)


def describe_machine(device: torch.device) -> str:
    """For the head of a table."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def print_result(result: Result, console: Console) -> None:
    """The result, and where its floor comes from, operation by operation."""
    machine = result.machine
    console.print(
        f"\n[bold]{result.name}[/bold]: {1e3 * result.seconds:.1f} ms, floor {1e3 * result.floor:.1f} ms, "
        f"ratio {result.ratio:.2f}   (this run: {machine.flops / 1e9:.0f} GFLOP/s, {machine.bytes / 1e9:.1f} GB/s)"
    )
    table = Table("operation", "GFLOP", "GB", "floor ms", "share")
    for column in table.columns[1:]:
        column.justify = "right"
    totals: dict[str, list[float]] = {}
    for op in result.operations:
        row = totals.setdefault(op.name, [0.0, 0.0, 0.0])
        for i, value in enumerate((op.flops, op.bytes, op.floor(machine))):
            row[i] += value
    for name, (flops, size, floor) in sorted(totals.items(), key=lambda item: -item[1][2]):
        share = f"{100 * floor / result.floor:.1f} %"
        table.add_row(name, f"{flops / 1e9:.2f}", f"{size / 1e9:.3f}", f"{1e3 * floor:.2f}", share)
    console.print(table)


def bench_config(name: str) -> Pi0Config:
    """ "mid", the name of a preset, or a JSON file."""
    if name == "mid":
        return MID
    return preset(name) if name in PRESETS else Pi0Config.from_json(name)


def run_bench(
    what: Sequence[str],
    *,
    config: Pi0Config,
    batch: int,
    num_cameras: int,
    prompt_tokens: int,
    num_steps: int,
    dtype: str,
    device: str,
    compiled: bool,
    repeats: int,
    num_draws: int,
    as_json: bool,
) -> None:
    """Run "model" (sampling) and "train" (a training step), and print time, floor and ratio."""
    counts = {"batch": batch, "cameras": num_cameras, "prompt_tokens": prompt_tokens, "repeats": repeats}
    counts["draws"] = num_draws
    if wrong := {name: count for name, count in counts.items() if count < 1}:
        raise UsageError(f"Expected positive numbers, got {wrong}.")
    if prompt_tokens > config.require("max_token_len"):
        raise UsageError(f"{prompt_tokens} prompt tokens do not fit into max_token_len {config.max_token_len}.")
    work = Workload(config, batch, num_cameras, prompt_tokens, num_steps, getattr(torch, dtype), device, num_draws)
    console = Console(stderr=as_json, highlight=False)
    console.print(describe_machine(torch.device(device)))
    results = []
    if "model" in what:
        results.append(bench_model(work, repeats=repeats, compiled=compiled))
    if "train" in what:
        results.append(bench_train(work, repeats=repeats, compiled=compiled))
    for result in results:
        print_result(result, console)
    if as_json:
        print(json.dumps([result_json(result) for result in results]))


def result_json(result: Result) -> dict[str, Any]:
    """The result as a JSON document."""
    return {
        "name": result.name,
        "seconds": result.seconds,
        "floor": result.floor,
        "ratio": result.ratio,
        "flops_per_second": result.machine.flops,
        "bytes_per_second": result.machine.bytes,
    }
