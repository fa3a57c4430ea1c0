"""The memory of a training run, before anything is allocated.

What lives is counted by `live_memory`. Not counted is what no tensor holds: CUDA's context, the workspaces of cuBLAS
and NCCL, what the allocator can't use of its blocks, and with `compile` what the compiler saves or takes.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from torchpi.checkpoints.address import published_name
from torchpi.config import Pi0Config
from torchpi.errors import TrainingError
from torchpi.robots import get_embodiment
from torchpi.training.config import TrainConfig
from torchpi.training.live_memory import KINDS, Memory, num_bytes, peak_memory, shard_bytes
from torchpi.training.weights import begin_model, model_config

USABLE = 0.93
"""Share of a device's memory that tensors may take; a rule of thumb for what is not counted."""


@dataclasses.dataclass(frozen=True)
class Alternative:
    """A recipe that differs in a few fields."""

    fields: Mapping[str, Any]
    total: int
    """Bytes per device."""
    fits: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run needs."""

    device: str
    world_size: int
    samples: int
    """That a process computes at once."""
    cameras: tuple[str, ...]
    prompt_tokens: int
    """Of each sample: as many as the model takes, which is the most that a prompt can have."""
    peak: Memory
    staged: int
    """Bytes of host memory for the copy of a checkpoint that is being written, in each process."""
    constant: int
    """Bytes of host memory for the weights that the run does not change, which the first process keeps for its
    policies; none of their own where the model is on the CPU."""
    device_memory: int | None
    """Bytes that a process can have on its device; None: not known."""
    alternatives: tuple[Alternative, ...] = ()
    """If it does not fit: what else was looked at."""

    @property
    def needed(self) -> int:
        """Bytes of the device's memory; on the CPU the copy of a checkpoint is there as well."""
        return self.peak.total + (self.staged if self.device == "cpu" else 0)

    @property
    def fits(self) -> bool | None:
        """Whether the memory is enough, with some room for what is not counted; None: its size is not known."""
        return None if self.device_memory is None else self.needed <= USABLE * self.device_memory

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        document = dataclasses.asdict(self)
        document["peak"]["total"] = self.peak.total
        return {**document, "needed": self.needed, "fits": self.fits}


def plan(config: TrainConfig, *, world_size: int, local_world_size: int, device_memory: int | None = None) -> Plan:
    """The memory of a run; no dataset is opened, and no weights are read.

    Args:
        config: the recipe. Of its datasets only the embodiments are looked at.
        world_size: processes that share the run.
        local_world_size: those of a node, for "hybrid" without `shard_size`.
        device_memory: bytes that a process can have on its device; without it the plan doesn't say whether it fits.
    """
    found = _plan(config, world_size, local_world_size, device_memory)
    if found.fits is not False:
        return found

    def looked_at(series: Iterable[Mapping[str, Any]]) -> Iterator[Alternative]:
        """Each goes further than the one before; the first one that fits is enough."""
        for fields in series:
            other = _plan(config.replace(**fields), world_size, local_world_size, device_memory)
            yield Alternative(fields, other.needed, bool(other.fits))
            if other.fits:
                return

    others = [other for series in _single_changes(config, world_size) for other in looked_at(series)]
    if not any(other.fits for other in others):
        others += looked_at(_together(config, world_size))
    return dataclasses.replace(found, alternatives=tuple(others))


def _single_changes(config: TrainConfig, world_size: int) -> Iterator[list[dict[str, Any]]]:
    kinds = ("none", "selective", "full")  # each keeps less
    yield [
        {"activation_checkpointing": kind} for kind in kinds[kinds.index(config.model.activation_checkpointing) + 1 :]
    ]
    yield [{"grad_accum_steps": count} for count in _more_passes(config, world_size)]
    if config.optim.ema_decay:
        yield [{"ema_decay": 0.0}]
    if config.parallel.strategy == "ddp" and config.optim.optimizer == "adamw":
        yield [{"optimizer": "adamw8bit"}]
    if config.parallel.strategy != "fsdp" and config.optim.optimizer == "adamw" and world_size > 1:
        yield [{"parallel": "fsdp"}]
    yield [{"finetune": kind} for kind in _less_trained(config)]


def _together(config: TrainConfig, world_size: int) -> Iterator[dict[str, Any]]:
    fields: dict[str, Any] = {"activation_checkpointing": "full"}
    if passes := _more_passes(config, world_size):
        fields["grad_accum_steps"] = passes[-1]
    yield dict(fields)
    if world_size > 1 and config.optim.optimizer == "adamw":
        yield {**fields, "parallel": "fsdp"}
    fields["ema_decay"] = 0.0
    if config.parallel.strategy == "ddp":
        fields["optimizer"] = "adamw8bit"
    yield dict(fields)
    for kind in _less_trained(config):
        yield {**fields, "finetune": kind}


def _more_passes(config: TrainConfig, world_size: int) -> list[int]:
    """Twice as many, and so on, while the samples can be divided."""
    counts, passes = [], 2 * config.grad_accum_steps
    while config.batch_size % (world_size * passes) == 0:
        counts.append(passes)
        passes *= 2
    return counts


def _less_trained(config: TrainConfig) -> list[str]:
    if config.model.init is None or config.model.finetune == "lora_strict":
        return []  # low-rank matrices learn beside trained weights
    return ["lora_strict"] if config.model.finetune == "lora" else ["lora", "lora_strict"]


def _plan(config: TrainConfig, world_size: int, local_world_size: int, device_memory: int | None) -> Plan:
    parts = world_size * config.grad_accum_steps
    if config.batch_size % parts:
        raise TrainingError(
            f"batch_size {config.batch_size} can't be divided by {world_size} processes × {config.grad_accum_steps} "
            "micro-batches."
        )
    sizes, cameras = _sizes(config), _cameras(config)
    shards = {"ddp": 1, "fsdp": world_size, "hybrid": config.parallel.shard_size or local_world_size}[
        config.parallel.strategy
    ]
    model, _ = begin_model(config, sizes, skeleton=True)
    device = _device_type(config)
    frozen = sum(num_bytes(p) for p in model.parameters() if not p.requires_grad)
    peak = peak_memory(model, config, sizes, cameras, world_size=world_size, shards=shards, device=device)
    trained = sum(shard_bytes(p, shards) for p in model.parameters() if p.requires_grad)
    return Plan(
        device=device,
        world_size=world_size,
        samples=config.batch_size // parts,
        cameras=cameras,
        prompt_tokens=sizes.require("max_token_len"),
        peak=peak,
        staged=trained + peak.optimizer + peak.ema,
        constant=0 if device == "cpu" else frozen,
        device_memory=device_memory,
    )


def _sizes(config: TrainConfig) -> Pi0Config:
    """Of a published checkpoint they are known by its name, so that nothing is downloaded."""
    if config.model.init is not None and (name := published_name(config.model.init)) is not None:
        config = config.replace(init=None, finetune="full", model=config.model.config or name)
    return model_config(config)


def _cameras(config: TrainConfig) -> tuple[str, ...]:
    if not all(source.embodiment for source in config.data.sources):
        raise TrainingError("A plan needs the robot, for the number of its cameras: --embodiment.")
    names = (name for source in config.data.sources for name in get_embodiment(source.embodiment).camera_names)
    return tuple(dict.fromkeys(names))


# ---- for people ----


def run_plan(config: TrainConfig, *, world_size: int | None, memory_gb: float | None, as_json: bool) -> int:
    """Print the plan of a run; the exit status, 1 if it does not fit.

    Args:
        world_size: by default the processes that torchrun has started.
        memory_gb: of each device, in 10⁹ bytes; by default what this machine has.
    """
    size = world_size or int(os.environ.get("WORLD_SIZE", 1))
    local = min(size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    memory = _device_memory(config, local) if memory_gb is None else int(memory_gb * 1e9)
    console = Console(stderr=True, highlight=False)
    with console.status("running it without numbers"):
        found = plan(config, world_size=size, local_world_size=local, device_memory=memory)
    if as_json:
        print(json.dumps(found.to_dict()))
    else:
        print_plan(found, config, Console(highlight=False))
    return 1 if found.fits is False else 0


def _device_type(config: TrainConfig) -> str:
    """Which a plan is for; CUDA need not be here."""
    return torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu")).type


def _device_memory(config: TrainConfig, local_world_size: int) -> int | None:
    """What a process can have on this machine: a whole GPU, or its share of the memory that is available."""
    if _device_type(config) == "cuda":
        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    meminfo = pathlib.Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024 // local_world_size


def print_plan(found: Plan, config: TrainConfig, console: Console) -> None:
    """Print a plan as a table, in 10⁹ bytes."""
    processes = f"{found.world_size} process{'es' if found.world_size > 1 else ''}"
    console.print(
        f"{processes} ({config.parallel.strategy}) on {found.device}; at once {found.samples} samples × "
        f"{config.optim.flow_samples_per_obs} noise, {len(found.cameras)} cameras and {found.prompt_tokens} prompt "
        "tokens, the most that the model takes"
    )
    table = Table("per process, at the peak", "GB", box=None, header_style="dim")
    table.columns[1].justify = "right"
    for name in KINDS:
        table.add_row(_NAMES[name], f"{getattr(found.peak, name) / 1e9:.2f}")
    table.add_row("together", f"{found.peak.total / 1e9:.2f}", style="bold")
    table.add_row("host: a checkpoint that is being written", f"{found.staged / 1e9:.2f}")
    if found.constant:
        table.add_row("host: constant weights, first process", f"{found.constant / 1e9:.2f}")
    console.print(table)
    what = "an update" if found.peak.moment == "update" else "a measurement on the held-out samples"
    console.print(f"The peak is in {what}. A plan, not a measurement; docs/memory.md says what is not counted.")
    _print_verdict(found, console)


def _print_verdict(found: Plan, console: Console) -> None:
    if found.device_memory is None:
        console.print(f"Whether it fits is not known: no {found.device} memory is known here; --plan-memory GB says it")
        return
    of = f"{found.needed / 1e9:.2f} of {found.device_memory / 1e9:.2f} GB, of which {USABLE:.0%} can be planned with"
    console.print(f"{'fits' if found.fits else 'DOES NOT FIT'}: {of}")
    for other in found.alternatives:
        options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in other.fields.items())
        console.print(f"  {'fits' if other.fits else 'does not fit'}, {other.total / 1e9:.2f} GB: {options}")


_NAMES = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "ema": "moving average",
    "data": "batches, held-out ones included",
    "activations": "activations",
    "gathered": "gathered layers",
}
