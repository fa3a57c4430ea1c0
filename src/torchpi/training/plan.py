"""`torchpi train --plan`: the estimated peak memory of a run, before anything is allocated.

Not counted is what no tensor holds: CUDA's context, the workspaces of cuBLAS and NCCL, fragmentation of the allocator,
and with `compile` what the compiler saves or takes.
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
"""Fraction of a device's memory that tensors may take; a rule of thumb for what is not counted."""
_ROWS = {
    "ema": "EMA weights",
    "data": "batches, held-out ones included",
    "gathered": "gathered layers",
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The memory of a run."""

    device: str
    world_size: int
    samples: int
    """Samples of a micro-batch."""
    cameras: tuple[str, ...]
    prompt_tokens: int
    """Prompt tokens per sample: the model's maximum."""
    peak: PeakMemory
    staged: int
    """Bytes of host memory for the copy of a checkpoint that is being written, in each process."""
    frozen: int
    """Bytes of host memory for the frozen weights, which the main process keeps for its policies; 0 where its model on
    the CPU has them whole."""
    building: int
    """Bytes of host memory in the main process while the model is built: its weights, whole, and the largest array,
    which is read or distributed."""
    device_memory: int | None
    """Bytes that a process can have on its device; None: unknown."""
    alternatives: tuple[dict[str, Any], ...] = ()
    """Recipes that were tried because this one does not fit: other options ("fields"), "total" bytes, and "fits"."""

    @property
    def needed(self) -> int:
        """Bytes of the device's memory; on the CPU with all that is the host's."""
        if self.device != "cpu":
            return self.peak.total
        return max(self.peak.total + self.staged + self.frozen, self.building)

    @property
    def fits(self) -> bool | None:
        """The memory is enough, with some room for what is not counted; None: its size is unknown."""
        return None if self.device_memory is None else self.needed <= USABLE * self.device_memory

    def to_dict(self) -> dict[str, Any]:
        """The document of `--json`."""
        document = dataclasses.asdict(self)
        document["peak"]["total"] = self.peak.total
        return {**document, "needed": self.needed, "fits": self.fits}


def plan(config: TrainConfig, *, world_size: int, local_world_size: int, device_memory: int | None = None) -> Plan:
    """The memory of a run; no dataset is opened, and no weights are read.

    Args:
        config: the recipe. Of its datasets only the embodiments matter.
        local_world_size: processes of a node, for "hybrid" without `shard_size`.
        device_memory: bytes that a process can have on its device.
    """
    if not all(source.embodiment for source in config.data.sources):
        raise TrainingError("A plan needs the robot, for the number of its cameras: --embodiment.")
    robots = [get_embodiment(source.embodiment) for source in config.data.sources]
    cameras = tuple(dict.fromkeys(name for robot in robots for name in robot.camera_names))
    sizes, device = planned_sizes(config), _device_type(config)
    config = with_dtype(config, torch.device(device))

    @functools.cache
    def without_moments(config: TrainConfig, shards: int) -> tuple[Pi0, PeakMemory]:
        model, _ = build_model(config, sizes, skeleton=True)
        return model, peak_memory(model, config, cameras, world_size=world_size, shards=shards, device=device)

    def estimate(config: TrainConfig) -> Plan:
        shards = num_shards(config.parallel.strategy, world_size, config.parallel.shard_size or local_world_size)
        samples = config.micro_batch_size(world_size)
        model, peak = without_moments(config.replace(optimizer="adamw", ema_decay=0.0), shards)
        sizes_of = {p: p.nbytes if config.model.init else 4 * p.numel() for p in model.parameters()}  # drawn in float32
        frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
        trained = [p for p in model.parameters() if p.requires_grad]
        trainable = sum(shard_bytes(p, shards) for p in trained)
        peak = dataclasses.replace(
            peak,
            optimizer=sum(moment_bytes(p, config.optim.optimizer, shards) for p in trained),
            ema=trainable if config.optim.ema_decay else 0,
        )
        return Plan(
            device=device,
            world_size=world_size,
            samples=samples,
            cameras=cameras,
            prompt_tokens=sizes.require("max_token_len"),
            peak=peak,
            staged=trainable + peak.optimizer + peak.ema,
            frozen=0 if device == "cpu" and shards == 1 else frozen,
            building=sum(sizes_of.values()) + max(sizes_of.values()),
            device_memory=device_memory,
        )

    found = estimate(config)
    if found.fits is not False:
        return found
    return dataclasses.replace(found, alternatives=tuple(_alternatives(config, world_size, estimate)))


def _alternatives(
    config: TrainConfig, world_size: int, estimate: Callable[[TrainConfig], Plan]
) -> Iterator[dict[str, Any]]:
    def tried(fields: dict[str, Any]) -> dict[str, Any]:
        other = estimate(config.replace(**fields))
        return {"fields": fields, "total": other.needed, "fits": bool(other.fits)}

    single, joint = _changes(config, world_size)
    is_enough = False
    for series in filter(None, single):
        # Each goes further than those before it: if the last one does not fit, none does.
        found = tried(series[-1])
        if found["fits"]:
            found, is_enough = next(other for other in map(tried, series) if other["fits"]), True
        yield found
    for fields in joint:
        if is_enough:
            break
        yield (found := tried(fields))
        is_enough = found["fits"]


def planned_sizes(config: TrainConfig) -> Pi0Config:
    """The model's sizes. Those of a published checkpoint are known by its name, so that nothing is downloaded."""
    if config.model.init is not None and (name := published_name(config.model.init)) is not None:
        alone = {"init": None, "lora_alpha": None, "finetune": "full", "model": config.model.config or name}
        return model_config(config.replace(**alone), None)
    return model_config(config, open_init(config))


def _changes(config: TrainConfig, world_size: int) -> tuple[list[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Series of single options that take less memory, and a series of several together."""
    strategy, can_shard = config.parallel.strategy, world_size > 1 and config.optim.optimizer == "adamw"
    kinds = ["none", "selective", "full"]  # each keeps less
    kinds = kinds[kinds.index(config.model.activation_checkpointing) + 1 :]
    counts, count = [], 2 * config.grad_accum_steps
    while config.batch_size % (world_size * count) == 0:
        counts.append(count)
        count *= 2
    finetune = ["lora", "lora_strict"][config.model.finetune == "lora" :]
    if config.model.init is None or config.model.finetune == "lora_strict":
        finetune = []  # low-rank matrices need trained weights
    single: list[list[dict[str, Any]]] = [
        [{"activation_checkpointing": kind} for kind in kinds],
        [{"grad_accum_steps": count} for count in counts],
        [{"ema_decay": 0.0}] if config.optim.ema_decay else [],
        [{"optimizer": "adamw8bit"}] if strategy == "ddp" and config.optim.optimizer == "adamw" else [],
        [{"parallel": "fsdp"}] if strategy != "fsdp" and can_shard else [],
        [{"finetune": kind} for kind in finetune],
    ]
    less: dict[str, Any] = {"activation_checkpointing": "full"} | ({"grad_accum_steps": counts[-1]} if counts else {})
    least = less | {"ema_decay": 0.0} | ({"optimizer": "adamw8bit"} if strategy == "ddp" else {})
    joint: list[dict[str, Any]] = [less, *([{**less, "parallel": "fsdp"}] if can_shard else []), least]
    return single, joint + [{**least, "finetune": kind} for kind in finetune]


def run_plan(config: TrainConfig, *, world_size: int | None, memory_gb: float | None, as_json: bool) -> int:
    """Print the plan of a run; the exit status, 1 if it does not fit.

    Args:
        world_size: by default the processes that torchrun has started.
        memory_gb: of each device, in 10⁹ bytes; by default that of this machine.
    """
    size = world_size or int(os.environ.get("WORLD_SIZE", 1))
    local = min(size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    memory = _device_memory(config, local) if memory_gb is None else int(memory_gb * 1e9)
    with PlainConsole(stderr=True).status("estimating the memory"):
        found = plan(config, world_size=size, local_world_size=local, device_memory=memory)
    if as_json:
        print_json(found.to_dict())
    else:
        _print_plan(found, config, PlainConsole())
    return 1 if found.fits is False else 0


def _device_type(config: TrainConfig) -> str:
    """The device of the plan; CUDA need not exist here."""
    return torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu")).type


def _device_memory(config: TrainConfig, local_world_size: int) -> int | None:
    """The memory of a process on this machine: a whole GPU, or its share of the available RAM."""
    if _device_type(config) == "cuda":
        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    return int(psutil.virtual_memory().available) // local_world_size


def _print_plan(found: Plan, config: TrainConfig, console: Console) -> None:
    console.print(
        f"{counted(found.world_size, 'process', 'processes')} ({config.parallel.strategy}) on {found.device}; at once "
        f"{counted(found.samples, 'sample')} × {counted(config.optim.flow_samples_per_obs, 'flow sample')}, "
        f"{counted(len(found.cameras), 'camera')} and {found.prompt_tokens} prompt tokens, as many as the model takes"
    )
    sizes = [(_ROWS.get(name, name), getattr(found.peak, name)) for name in KINDS]
    sizes += [("total", found.peak.total), ("host: a checkpoint that is being written", found.staged)]
    sizes += [("host: frozen weights, main process", found.frozen)] if found.frozen else []
    sizes += [("host: building the model, main process", found.building)]
    columns = [Column("per process, at the peak"), Column("GB", "number")]
    console.print(Table(columns, [(name, f"{nbytes / 1e9:.2f}") for name, nbytes in sizes]).to_rich(), crop=False)
    moment = "an update" if found.peak.moment == "update" else "an evaluation on the held-out samples"
    console.print(f"The peak is in {moment}. An estimate, not a measurement; docs/memory.md says what is not counted.")
    if found.device_memory is None:
        console.print(f"The {found.device} memory is unknown here; --plan-memory GB states it")
        return
    of = f"{found.needed / 1e9:.2f} of {found.device_memory / 1e9:.2f} GB, of which {USABLE:.0%} can be planned with"
    console.print(f"{'fits' if found.fits else 'DOES NOT FIT'}: {of}")
    for other in found.alternatives:
        options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in other["fields"].items())
        console.print(f"  {'fits' if other['fits'] else 'does not fit'}, {other['total'] / 1e9:.2f} GB: {options}")
