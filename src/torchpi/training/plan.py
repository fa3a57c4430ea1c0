"""`torchpi train --plan`: the estimated peak memory of a run, before anything is allocated.

Not counted is what no tensor holds: CUDA's context, the workspaces of cuBLAS and NCCL, fragmentation of the allocator,
and with `compile` what the compiler saves or takes.
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from torchpi.checkpoints.address import published_name
from torchpi.config import Pi0Config
from torchpi.errors import TrainingError
from torchpi.robots import get_embodiment
from torchpi.training.config import TrainConfig
from torchpi.training.memory import KINDS, PeakMemory, num_bytes, peak_memory, shard_bytes
from torchpi.training.weights import build_model, model_config
from torchpi.ui.format import print_json

USABLE = 0.93
"""Fraction of a device's memory that tensors may take; a rule of thumb for what is not counted."""
_ROWS = {
    "ema": "EMA weights",
    "data": "batches, held-out ones included",
    "gathered": "gathered layers",
}


@dataclasses.dataclass(frozen=True)
class Alternative:
    """A recipe with a few other options."""

    fields: Mapping[str, Any]
    total: int
    """Bytes per device."""
    fits: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """The memory of a run."""

    device: str
    world_size: int
    samples: int
    """Of a micro-batch."""
    cameras: tuple[str, ...]
    prompt_tokens: int
    """Of each sample: the most that the model takes."""
    peak: PeakMemory
    staged: int
    """Bytes of host memory for the copy of a checkpoint that is being written, in each process."""
    frozen: int
    """Bytes of host memory for the frozen weights, which the main process keeps for its policies; 0 where the model is
    on the CPU."""
    device_memory: int | None
    """Bytes that a process can have on its device; None: unknown."""
    alternatives: tuple[Alternative, ...] = ()
    """Recipes that were tried because this one does not fit."""

    @property
    def needed(self) -> int:
        """Bytes of the device's memory; on the CPU with the copy of a checkpoint."""
        return self.peak.total + (self.staged if self.device == "cpu" else 0)

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
    found = _plan(config, world_size, local_world_size, device_memory)
    if found.fits is not False:
        return found

    def tried(series: Iterable[Mapping[str, Any]]) -> Iterator[Alternative]:
        """Each goes further than the one before; the first one that fits is enough."""
        for fields in series:
            other = _plan(config.replace(**fields), world_size, local_world_size, device_memory)
            yield Alternative(fields, other.needed, bool(other.fits))
            if other.fits:
                return

    others = [other for series in _single_changes(config, world_size) for other in tried(series)]
    if not any(other.fits for other in others):
        others += tried(_joint_changes(config, world_size))
    return dataclasses.replace(found, alternatives=tuple(others))


def _single_changes(config: TrainConfig, world_size: int) -> Iterator[list[dict[str, Any]]]:
    kinds = ("none", "selective", "full")  # each keeps less
    less_kept = kinds[kinds.index(config.model.activation_checkpointing) + 1 :]
    yield [{"activation_checkpointing": kind} for kind in less_kept]
    yield [{"grad_accum_steps": count} for count in _more_micro_batches(config, world_size)]
    if config.optim.ema_decay:
        yield [{"ema_decay": 0.0}]
    if config.parallel.strategy == "ddp" and config.optim.optimizer == "adamw":
        yield [{"optimizer": "adamw8bit"}]
    if config.parallel.strategy != "fsdp" and config.optim.optimizer == "adamw" and world_size > 1:
        yield [{"parallel": "fsdp"}]
    yield [{"finetune": kind} for kind in _less_trained(config)]


def _joint_changes(config: TrainConfig, world_size: int) -> Iterator[dict[str, Any]]:
    fields: dict[str, Any] = {"activation_checkpointing": "full"}
    if counts := _more_micro_batches(config, world_size):
        fields["grad_accum_steps"] = counts[-1]
    yield dict(fields)
    if world_size > 1 and config.optim.optimizer == "adamw":
        yield {**fields, "parallel": "fsdp"}
    fields["ema_decay"] = 0.0
    if config.parallel.strategy == "ddp":
        fields["optimizer"] = "adamw8bit"
    yield dict(fields)
    for kind in _less_trained(config):
        yield {**fields, "finetune": kind}


def _more_micro_batches(config: TrainConfig, world_size: int) -> list[int]:
    """Twice as many, and so on, while the samples can be divided."""
    counts, count = [], 2 * config.grad_accum_steps
    while config.batch_size % (world_size * count) == 0:
        counts.append(count)
        count *= 2
    return counts


def _less_trained(config: TrainConfig) -> list[str]:
    if config.model.init is None or config.model.finetune == "lora_strict":
        return []  # low-rank matrices need trained weights
    return ["lora_strict"] if config.model.finetune == "lora" else ["lora", "lora_strict"]


def _plan(config: TrainConfig, world_size: int, local_world_size: int, device_memory: int | None) -> Plan:
    divisor = world_size * config.grad_accum_steps
    if config.batch_size % divisor:
        raise TrainingError(
            f"batch_size {config.batch_size} can't be divided by {world_size} processes × {config.grad_accum_steps} "
            "micro-batches."
        )
    sizes, cameras = _sizes(config), _cameras(config)
    hybrid = config.parallel.shard_size or local_world_size
    shards = {"ddp": 1, "fsdp": world_size, "hybrid": hybrid}[config.parallel.strategy]
    model, _ = build_model(config, sizes, skeleton=True)
    device = _device_type(config)
    frozen = sum(num_bytes(p) for p in model.parameters() if not p.requires_grad)
    peak = peak_memory(model, config, cameras, world_size=world_size, shards=shards, device=device)
    trainable = sum(shard_bytes(p, shards) for p in model.parameters() if p.requires_grad)
    return Plan(
        device=device,
        world_size=world_size,
        samples=config.batch_size // divisor,
        cameras=cameras,
        prompt_tokens=sizes.require("max_token_len"),
        peak=peak,
        staged=trainable + peak.optimizer + peak.ema,
        frozen=0 if device == "cpu" else frozen,
        device_memory=device_memory,
    )


def _sizes(config: TrainConfig) -> Pi0Config:
    """Those of a published checkpoint are known by its name, so that nothing is downloaded."""
    if config.model.init is not None and (name := published_name(config.model.init)) is not None:
        config = config.replace(init=None, finetune="full", model=config.model.config or name)
    return model_config(config)


def _cameras(config: TrainConfig) -> tuple[str, ...]:
    if not all(source.embodiment for source in config.data.sources):
        raise TrainingError("A plan needs the robot, for the number of its cameras: --embodiment.")
    robots = [get_embodiment(source.embodiment) for source in config.data.sources]
    return tuple(dict.fromkeys(name for robot in robots for name in robot.camera_names))


def run_plan(config: TrainConfig, *, world_size: int | None, memory_gb: float | None, as_json: bool) -> int:
    """Print the plan of a run; the exit status, 1 if it does not fit.

    Args:
        world_size: by default the processes that torchrun has started.
        memory_gb: of each device, in 10⁹ bytes; by default that of this machine.
    """
    size = world_size or int(os.environ.get("WORLD_SIZE", 1))
    local = min(size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    memory = _device_memory(config, local) if memory_gb is None else int(memory_gb * 1e9)
    with Console(stderr=True, highlight=False).status("estimating the memory"):
        found = plan(config, world_size=size, local_world_size=local, device_memory=memory)
    if as_json:
        print_json(found.to_dict())
    else:
        _print_plan(found, config, Console(highlight=False))
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
    processes = f"{found.world_size} process{'es' if found.world_size > 1 else ''}"
    console.print(
        f"{processes} ({config.parallel.strategy}) on {found.device}; at once {found.samples} samples × "
        f"{config.optim.flow_samples_per_obs} noise, {len(found.cameras)} cameras and {found.prompt_tokens} prompt "
        "tokens, the most that the model takes"
    )
    table = Table("per process, at the peak", "GB", box=None, header_style="dim")
    table.columns[1].justify = "right"
    for name in KINDS:
        table.add_row(_ROWS.get(name, name), f"{getattr(found.peak, name) / 1e9:.2f}")
    table.add_row("total", f"{found.peak.total / 1e9:.2f}", style="bold")
    table.add_row("host: a checkpoint that is being written", f"{found.staged / 1e9:.2f}")
    if found.frozen:
        table.add_row("host: frozen weights, main process", f"{found.frozen / 1e9:.2f}")
    console.print(table)
    moment = "an update" if found.peak.moment == "update" else "an evaluation on the held-out samples"
    console.print(f"The peak is in {moment}. An estimate, not a measurement; docs/memory.md says what is not counted.")
    if found.device_memory is None:
        console.print(f"The {found.device} memory is unknown here; --plan-memory GB states it")
        return
    of = f"{found.needed / 1e9:.2f} of {found.device_memory / 1e9:.2f} GB, of which {USABLE:.0%} can be planned with"
    console.print(f"{'fits' if found.fits else 'DOES NOT FIT'}: {of}")
    for other in found.alternatives:
        options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in other.fields.items())
        console.print(f"  {'fits' if other.fits else 'does not fit'}, {other.total / 1e9:.2f} GB: {options}")
