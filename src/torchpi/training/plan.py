"""`torchpi train --plan`: the estimated peak memory of a run, before anything is allocated.

The estimate counts tensors. It leaves out the CUDA context, the workspaces of cuBLAS and NCCL, fragmentation of the
allocator, and memory that `compile` saves or adds.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch
from rich.console import Console

from torchpi.checkpoints.address import published_name
from torchpi.config import Pi0Config
from torchpi.errors import TrainingError, counted
from torchpi.model.pi0 import Pi0
from torchpi.robots import get_embodiment
from torchpi.training.config import TrainConfig
from torchpi.training.distributed import num_shards
from torchpi.training.memory import KINDS, PeakMemory, moment_bytes, peak_memory, shard_bytes
from torchpi.training.weights import build_model, model_config, open_init, with_dtype
from torchpi.ui.format import print_json
from torchpi.ui.tables import Column, PlainConsole, Table

USABLE = 0.93
"""Fraction of a device's memory available to tensors; the rest is a rule of thumb for what is not counted."""
_ROW_LABELS = {
    "ema": "EMA weights",
    "data": "batches, held-out ones included",
    "gathered": "gathered layers",
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Estimated memory of a run."""

    device: str
    world_size: int
    samples: int
    """Samples per micro-batch and process."""
    cameras: tuple[str, ...]
    prompt_tokens: int
    """Prompt tokens per sample: the model's maximum length."""
    peak: PeakMemory
    staged: int
    """Host memory for the copy of a checkpoint being written, per process, in bytes."""
    frozen: int
    """Host memory of the main process for the frozen weights of the saved policies, in bytes; 0 if its model is on the
    CPU and not sharded."""
    building: int
    """Host memory of the main process while it builds the model, in bytes: all weights, plus a second copy of the
    largest array while it is read or distributed."""
    device_memory: int | None
    """Device memory available to each process, in bytes; None if unknown."""
    alternatives: tuple[dict[str, Any], ...] = ()
    """Changed recipes, tried if this one does not fit: the changed options ("fields"), "total" bytes, and "fits"."""

    @property
    def needed(self) -> int:
        """Device memory needed per process, in bytes; on the CPU, the host memory is included."""
        if self.device != "cpu":
            return self.peak.total
        return max(self.peak.total + self.staged + self.frozen, self.building)

    @property
    def fits(self) -> bool | None:
        """True if the plan fits in the usable memory of the device; None if that is unknown."""
        return None if self.device_memory is None else self.needed <= USABLE * self.device_memory

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        document = dataclasses.asdict(self)
        document["peak"]["total"] = self.peak.total
        return {**document, "needed": self.needed, "fits": self.fits}


def plan(config: TrainConfig, *, world_size: int, local_world_size: int, device_memory: int | None = None) -> Plan:
    """Estimate the memory of a run. No dataset is opened, and no weights are read.

    Args:
        config: the recipe; only the embodiments of its datasets matter.
        local_world_size: processes per node, for "hybrid" without `shard_size`.
        device_memory: device memory available to each process, in bytes.
    """
    if not all(source.embodiment for source in config.data.sources):
        raise TrainingError("A plan needs the robot, for the number of its cameras: --embodiment.")
    robots = [get_embodiment(source.embodiment) for source in config.data.sources]
    cameras = tuple(dict.fromkeys(name for robot in robots for name in robot.camera_names))
    sizes, device = planned_sizes(config), _device_type(config)
    config = with_dtype(config, torch.device(device))

    @functools.cache
    def peak_without_moments(config: TrainConfig, shards: int) -> tuple[Pi0, PeakMemory]:
        model, _ = build_model(config, sizes, skeleton=True)
        return model, peak_memory(model, config, cameras, world_size=world_size, shards=shards, device=device)

    def estimate(config: TrainConfig) -> Plan:
        shards = num_shards(config.parallel.strategy, world_size, config.parallel.shard_size or local_world_size)
        samples = config.micro_batch_size(world_size)
        # The moments and the EMA weights are added below, so that recipes which differ only in them share one estimate.
        model, peak = peak_without_moments(config.replace(optimizer="adamw", ema_decay=0.0), shards)
        parameters = list(model.parameters())
        trainable = [p for p in parameters if p.requires_grad]
        trainable_bytes = sum(shard_bytes(p, shards) for p in trainable)
        frozen_bytes = sum(p.nbytes for p in parameters if not p.requires_grad)
        # Weights are read in the dtype in which they are kept, but initialized at random in float32.
        built_bytes = [p.nbytes if config.model.init else 4 * p.numel() for p in parameters]
        peak = dataclasses.replace(
            peak,
            optimizer=sum(moment_bytes(p, config.optim.optimizer, shards) for p in trainable),
            ema=trainable_bytes if config.optim.ema_decay else 0,
        )
        return Plan(
            device=device,
            world_size=world_size,
            samples=samples,
            cameras=cameras,
            prompt_tokens=sizes.require("max_token_len"),
            peak=peak,
            staged=trainable_bytes + peak.optimizer + peak.ema,
            frozen=0 if device == "cpu" and shards == 1 else frozen_bytes,
            building=sum(built_bytes) + max(built_bytes),
            device_memory=device_memory,
        )

    estimated = estimate(config)
    if estimated.fits is not False:
        return estimated
    return dataclasses.replace(estimated, alternatives=tuple(_alternatives(config, world_size, estimate)))


def planned_sizes(config: TrainConfig) -> Pi0Config:
    """The model's sizes. Published checkpoints are recognized by their name, so that nothing is downloaded."""
    if config.model.init is not None and (name := published_name(config.model.init)) is not None:
        from_scratch = {"init": None, "lora_alpha": None, "finetune": "full", "model": config.model.config or name}
        return model_config(config.replace(**from_scratch), None)
    return model_config(config, open_init(config))


def _alternatives(
    config: TrainConfig, world_size: int, estimate: Callable[[TrainConfig], Plan]
) -> Iterator[dict[str, Any]]:
    """Recipes that need less memory: the smallest sufficient change per option, or else combinations of changes."""

    def attempt(fields: dict[str, Any]) -> dict[str, Any]:
        changed = estimate(config.replace(**fields))
        return {"fields": fields, "total": changed.needed, "fits": bool(changed.fits)}

    single_options, combinations = _changes(config, world_size)
    fits = False
    for steps in single_options:
        result = attempt(steps[-1])  # saves most: if it does not fit, no earlier step does
        if result["fits"]:
            result = next(other for other in map(attempt, steps) if other["fits"])
            fits = True
        yield result
    for fields in combinations:
        if fits:
            return
        result = attempt(fields)
        fits = result["fits"]
        yield result


def _changes(config: TrainConfig, world_size: int) -> tuple[list[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Changes of single options (a list per option, each entry saving more than the one before), and combinations."""
    strategy, can_shard = config.parallel.strategy, world_size > 1 and config.optim.optimizer == "adamw"
    checkpointing = ["none", "selective", "full"]
    checkpointing = checkpointing[checkpointing.index(config.model.activation_checkpointing) + 1 :]
    accumulation = []
    num_micro_batches = 2 * config.grad_accum_steps
    while config.batch_size % (world_size * num_micro_batches) == 0:
        accumulation.append(num_micro_batches)
        num_micro_batches *= 2
    finetune = ["lora_strict"] if config.model.finetune == "lora" else ["lora", "lora_strict"]
    if config.model.init is None or config.model.finetune == "lora_strict":
        finetune = []  # LoRA matrices need trained weights
    single_options: list[list[dict[str, Any]]] = [
        [{"activation_checkpointing": kind} for kind in checkpointing],
        [{"grad_accum_steps": count} for count in accumulation],
        [{"ema_decay": 0.0}] if config.optim.ema_decay else [],
        [{"optimizer": "adamw8bit"}] if strategy == "ddp" and config.optim.optimizer == "adamw" else [],
        [{"parallel": "fsdp"}] if strategy != "fsdp" and can_shard else [],
        [{"finetune": kind} for kind in finetune],
    ]
    activations: dict[str, Any] = {"activation_checkpointing": "full"}
    if accumulation:
        activations["grad_accum_steps"] = accumulation[-1]
    smallest = {**activations, "ema_decay": 0.0, **({"optimizer": "adamw8bit"} if strategy == "ddp" else {})}
    sharded = [{**activations, "parallel": "fsdp"}] if can_shard else []
    combinations = [activations, *sharded, smallest, *({**smallest, "finetune": kind} for kind in finetune)]
    return list(filter(None, single_options)), combinations


def run_plan(config: TrainConfig, *, world_size: int | None, memory_gb: float | None, as_json: bool) -> int:
    """Print the plan of a run. Returns the exit status: 1 if the run does not fit.

    Args:
        world_size: by default the number of processes that torchrun has started.
        memory_gb: memory of each device in GB (10⁹ bytes); by default that of this machine.
    """
    size = world_size or int(os.environ.get("WORLD_SIZE", 1))
    local_size = min(size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    memory = _device_memory(config, local_size) if memory_gb is None else int(memory_gb * 1e9)
    with PlainConsole(stderr=True).status("estimating the memory"):
        estimated = plan(config, world_size=size, local_world_size=local_size, device_memory=memory)
    if as_json:
        print_json(estimated.to_dict())
    else:
        _print_plan(estimated, config, PlainConsole())
    return 1 if estimated.fits is False else 0


def _device_type(config: TrainConfig) -> str:
    """Type of the planned device; a CUDA device need not exist on this machine."""
    return torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu")).type


def _device_memory(config: TrainConfig, local_world_size: int) -> int | None:
    """Memory of a process on this machine in bytes: a whole GPU, or its share of the available RAM."""
    if _device_type(config) == "cuda":
        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    return int(psutil.virtual_memory().available) // local_world_size


def _print_plan(estimated: Plan, config: TrainConfig, console: Console) -> None:
    console.print(
        f"{counted(estimated.world_size, 'process', 'processes')} ({config.parallel.strategy}) on {estimated.device}; "
        f"at once {counted(estimated.samples, 'sample')} × "
        f"{counted(config.optim.flow_samples_per_obs, 'flow sample')}, {counted(len(estimated.cameras), 'camera')} and "
        f"{estimated.prompt_tokens} prompt tokens, the model's maximum"
    )
    rows = [(_ROW_LABELS.get(kind, kind), getattr(estimated.peak, kind)) for kind in KINDS]
    rows += [("total", estimated.peak.total), ("host: copy of a checkpoint being written", estimated.staged)]
    if estimated.frozen:
        rows.append(("host: frozen weights, main process", estimated.frozen))
    rows.append(("host: building the model, main process", estimated.building))
    columns = [Column("per process, at the peak"), Column("GB", "number")]
    console.print(Table(columns, [(label, f"{nbytes / 1e9:.2f}") for label, nbytes in rows]).to_rich(), crop=False)
    phase = "an update" if estimated.peak.moment == "update" else "an evaluation on the held-out samples"
    console.print(f"The peak is in {phase}. An estimate, not a measurement; docs/memory.md says what is not counted.")
    if estimated.device_memory is None:
        console.print(f"The {estimated.device} memory is unknown here; --plan-memory GB states it")
        return
    console.print(
        f"{'fits' if estimated.fits else 'DOES NOT FIT'}: {estimated.needed / 1e9:.2f} of "
        f"{estimated.device_memory / 1e9:.2f} GB, of which {USABLE:.0%} are usable"
    )
    for other in estimated.alternatives:
        options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in other["fields"].items())
        console.print(f"  {'fits' if other['fits'] else 'does not fit'}, {other['total'] / 1e9:.2f} GB: {options}")
