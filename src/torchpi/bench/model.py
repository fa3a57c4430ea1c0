"""`bench model` and `bench train`: sampling and a training step, compared with their floors."""

import contextlib
import dataclasses
import os
import pathlib
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence

import torch

from torchpi.bench.floor import Result, measure, timed
from torchpi.config import PRESETS, GemmaConfig, Pi0Config, VisionConfig, preset
from torchpi.engine import InferenceEngine
from torchpi.engine.runner import Mode
from torchpi.errors import UsageError
from torchpi.model.operations import Workload, sampling_ops, training_ops
from torchpi.model.pi0 import Pi0
from torchpi.training.config import OptimConfig, TrainConfig
from torchpi.training.distributed import single_process
from torchpi.training.loop import compile_layers, update
from torchpi.training.samples import Batch
from torchpi.training.state import TrainState
from torchpi.types import Observation
from torchpi.ui.format import print_json
from torchpi.ui.tables import PlainConsole

# Two CPU cores run this model in a second. It is large enough that matmuls dominate, as they do at full size.
MID = Pi0Config(
    pi05=True,
    paligemma_variant=GemmaConfig(width=512, depth=6, mlp_dim=2048, num_heads=8, num_kv_heads=1, head_dim=64),
    action_expert_variant=GemmaConfig(width=256, depth=6, mlp_dim=1024, num_heads=8, num_kv_heads=1, head_dim=64),
    siglip_variant=VisionConfig(width=384, depth=6, mlp_dim=1536, num_heads=6, patch=14),
    vocab_size=8192,
)


def bench_config(name: str) -> Pi0Config:
    """Config of "mid", of a preset, or from a JSON file."""
    if name == "mid":
        return MID
    if name in PRESETS:
        return preset(name)
    if not pathlib.Path(name).is_file():
        raise UsageError(f"--config {name} is neither a file nor a preset; presets are mid, {', '.join(PRESETS)}.")
    return Pi0Config.from_json(name)


def run_bench(
    names: Sequence[str],
    work: Workload,
    *,
    engine: Mode | None,
    compiled: bool,
    busy: bool,
    repeats: int,
    as_json: bool,
) -> None:
    """Run "model" (sampling) or "train" (a training step), and print time, floor and ratio."""
    counts = {
        "batch": work.batch,
        "cameras": work.num_cameras,
        "prompt_tokens": work.prompt_tokens,
        "repeats": repeats,
        "flow_samples_per_obs": work.flow_samples_per_obs,
        "num_samples": work.num_samples,
    }
    if wrong := {name: count for name, count in counts.items() if count < 1}:
        raise UsageError(f"Expected positive numbers, got {wrong}.")
    max_token_len = work.config.require("max_token_len")
    if work.prompt_tokens > max_token_len:
        raise UsageError(f"{work.prompt_tokens} prompt tokens do not fit into max_token_len {max_token_len}.")
    console = PlainConsole(stderr=as_json)
    console.print(describe_machine(torch.device(work.device)))
    results = []
    for name in names:
        if name == "model":
            results.append(bench_model(work, repeats=repeats, engine=engine, busy=busy))
        else:
            results.append(bench_train(work, repeats=repeats, compiled=compiled))
        results[-1].print(console)
    if as_json:
        print_json([result.to_json() for result in results])


def describe_machine(device: torch.device) -> str:
    """The head of a table."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def bench_model(work: Workload, *, repeats: int = 5, engine: Mode | None = None, busy: bool = False) -> Result:
    """Measure `sample_actions` of the model or an engine.

    Args:
        busy: measure a second time while other processes keep all cores busy.
    """
    model = Pi0(work.config, device=work.device).to(work.dtype).eval()
    observation = make_observation(work, torch.device(work.device))
    noise = torch.randn(work.batch, work.num_samples, *work.config.chunk_shape, device=work.device)
    sampler = model if engine is None else InferenceEngine(model, mode=engine)

    def run() -> None:
        sampler.sample_many(observation, noise=noise, num_steps=work.num_steps)

    run()
    if isinstance(sampler, InferenceEngine) and not sampler.metadata["warm_buckets"]:
        raise UsageError(
            "The engine has no bucket for this batch size, or could not prepare it; see the warning above."
        )
    name = "sample_actions" if work.num_samples == 1 else f"sample_many, {work.num_samples} samples"
    name += "" if engine is None else f", {engine} engine"
    result = measure(name, run, sampling_ops(work), work, repeats)
    if not busy:
        return result
    with busy_cores():
        times = [timed(run, torch.device(work.device)) for _ in range(repeats)]
    return dataclasses.replace(result, busy_seconds=statistics.median(times))


@contextlib.contextmanager
def busy_cores() -> Iterator[None]:
    """Keep every core busy with a process, as on a robot's computer that runs other programs too."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def bench_train(work: Workload, *, repeats: int = 5, compiled: bool = False) -> Result:
    """Measure one update of `torchpi train`: float32 weights, matmuls in the workload's dtype, AdamW, EMA weights."""
    model = Pi0(work.config, device=work.device, compute_dtype=work.dtype)
    if compiled:
        compile_layers(model)
    config = TrainConfig(batch_size=work.batch, optim=OptimConfig(flow_samples_per_obs=work.flow_samples_per_obs))
    state = TrainState.create(model, weight_decay=config.optim.weight_decay, ema=True)
    device = torch.device(work.device)
    shape = (work.batch, work.flow_samples_per_obs, *work.config.chunk_shape)
    generator = torch.Generator(device).manual_seed(0)
    noise = torch.randn(shape, generator=generator, device=device)
    time = torch.rand(shape[:2], generator=generator, device=device)
    # The trainer drops padding common to all samples of a batch.
    observation = make_observation(work, device, padded=False)
    batch = Batch(observation, noise[:, 0], torch.ones_like(noise[:, 0], dtype=torch.bool), noise, time, indices=())
    parallel = single_process(model)
    return measure("training step", lambda: update(state, config, [batch], parallel), training_ops(work), work, repeats)


def make_observation(work: Workload, device: torch.device, *, padded: bool = True) -> Observation:
    """Batch of random images, and random prompts of the workload's length, padded as in a policy."""
    generator = torch.Generator().manual_seed(0)
    config = work.config
    size, length = config.image_size, config.require("max_token_len") if padded else work.prompt_tokens
    images = {
        f"camera_{i}": torch.randint(0, 256, (work.batch, size, size, 3), dtype=torch.uint8, generator=generator)
        for i in range(work.num_cameras)
    }
    valid = torch.arange(length) < work.prompt_tokens
    return Observation.from_dict(
        {
            "image": images,
            "state": torch.zeros(work.batch, config.action_dim),
            "tokenized_prompt": torch.randint(0, config.vocab_size, (work.batch, length), generator=generator),
            "tokenized_prompt_mask": valid.expand(work.batch, length),
        }
    ).to(device)
