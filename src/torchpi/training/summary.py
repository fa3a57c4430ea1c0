"""The summary of a run before its first step: run.json, and the same printed."""

import dataclasses
import datetime
import itertools
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console

from torchpi.data.fit import stats_problems
from torchpi.data.rate import rate_note
from torchpi.devices import has_bfloat16
from torchpi.errors import counted, first_of
from torchpi.model.lora import is_lora
from torchpi.model.pi0 import Pi0
from torchpi.policy import Policy
from torchpi.robots.commands import control_gaps
from torchpi.training.config import TrainConfig
from torchpi.training.distributed import World
from torchpi.training.optim import learning_rate
from torchpi.training.run_folder import number
from torchpi.training.setup import SourceData
from torchpi.training.weights import InitReport, parameter_table
from torchpi.ui.format import format_count, large_count
from torchpi.ui.tables import Column, Table
from torchpi.version import __version__

_MOSTLY_INITIAL = 0.5


def run_document(
    config: TrainConfig, world: World, model: Pi0, init: InitReport, data: Sequence[SourceData]
) -> dict[str, Any]:
    """run.json: the start of the run, or its last resume."""
    fresh = list(init.fresh) if init.loaded else len(init.fresh)
    return {
        "command": shlex.join([*sys.orig_argv[:1], *sys.argv]),
        "started": now(),
        "torchpi": __version__,
        "torch": torch.__version__,
        "device": str(world.device),
        "world_size": world.size,
        "datasets": [
            {
                "dataset": source.source.dataset,
                "embodiment": source.embodiment.name,
                "weight": source.source.weight,
                "fps": source.train.fps,
                "frames": len(source.frames),
                "episodes": len(source.train.episode_lengths),
                "holdout_episodes": len(source.holdout.episode_lengths) if source.holdout else 0,
                "held_out": list(source.holdout.episode_indices) if source.holdout else [],
                "tasks": sorted(source.train.tasks.values()),
            }
            for source in data
        ],
        "parameters": [dataclasses.asdict(part) for part in parameter_table(model, config)],
        "init": dataclasses.asdict(init) | {"loaded": len(init.loaded), "fresh": fresh},
    }


def now() -> str:
    """The time, as run.json has it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def describe(
    console: Console,
    config: TrainConfig,
    model: Pi0,
    info: Mapping[str, Any],
    data: Sequence[SourceData],
    policies: Sequence[Policy],
    prompts: Mapping[str, int],
    first_step: int = 0,
) -> None:
    """Print the model, its trained parameters and initial weights, and the data.

    Args:
        info: the run's document.
        prompts: tokens of each task's longest prompt.
        first_step: that of the checkpoint from which the run is resumed; 0: it begins, unless `stats_problems` raises.
    """
    text, table = show_parameters(info["parameters"])
    console.print(f"{model.config.variant}, {config.model.finetune}: {text}")
    console.print(table.to_rich(), crop=False)
    _describe_weights(console, info, first_step)
    weights = sum(dataset["weight"] for dataset in info["datasets"])
    for dataset, source, policy in zip(info["datasets"], data, policies, strict=True):
        _describe_dataset(console, config, dataset, source, dataset["weight"] / weights)
        for gap in control_gaps(source.embodiment, model.config.action_horizon):
            console.print(f"  warning: embodiment {source.embodiment.name}: {gap}")
        if source.source.norm_stats != "dataset" and not first_step:
            for problem in stats_problems(source.train, source.embodiment, policy.transforms):
                console.print(f"  warning: {problem}")
    for one, other in itertools.combinations([each for each in data if each.source.norm_stats == "dataset"], 2):
        robots = one.embodiment, other.embodiment
        if len({(robot.state_names, robot.action_names) for robot in robots}) == 1:
            console.print(
                f"  note: {one.source.dataset} and {other.source.dataset} have the same state and actions, and each "
                "its own statistics, as of two robots; for one policy: torchpi data merge, or norm_stats with a file"
            )
    longest = max(prompts, key=lambda text: prompts[text])
    limit = model.config.max_token_len or "any number of"
    console.print(f"prompts: at most {prompts[longest]} of {limit} tokens ({longest!r})")
    console.print(
        f"{counted(config.num_steps, 'step')} of {counted(config.batch_size, 'sample')} × "
        f"{counted(config.optim.flow_samples_per_obs, 'flow sample')}, in "
        f"{counted(info['world_size'], 'process', 'processes')} ({config.parallel.strategy}) and "
        f"{counted(config.grad_accum_steps, 'micro-batch', 'micro-batches')}"
    )
    if not has_bfloat16(torch.device(info["device"])):
        emulated = f"this {info['device']} device has no bfloat16 arithmetic and emulates it, many times slower"
        is_slow = config.model.dtype == "bfloat16"
        console.print(f"  warning: {emulated}: --dtype float32" if is_slow else f"matmuls in float32: {emulated}")
    _warn_of_short_run(console, config)


def _warn_of_short_run(console: Console, config: TrainConfig) -> None:
    """Warn where the run ends before the warm-up, or before the EMA weights have left the initial ones."""
    optim, steps = config.optim, config.num_steps
    if steps <= optim.warmup_steps:
        highest = learning_rate(steps - 1, optim, steps)
        console.print(
            f"  warning: warmup_steps {optim.warmup_steps} is not below num_steps {steps}: the learning rate reaches "
            f"{highest:.2g}, not lr {optim.lr:g}; --warmup-steps {steps // 30}, as openpi's share, reaches it"
        )
    if (end := optim.decay_steps or steps) < steps and optim.lr_schedule == "cosine":
        console.print(f"  note: the learning rate stays at min_lr {optim.min_lr:g} from decay_steps {end} on")
    if (kept := optim.ema_decay**steps) > _MOSTLY_INITIAL and optim.ema_decay:
        console.print(
            f"  warning: the EMA weights, with which the policy is saved, keep {100 * kept:.0f} % of the initial ones "
            f"after {counted(steps, 'step')} (ema_decay {optim.ema_decay:g}); --ema-decay {max(0, 1 - 10 / steps):.3g} "
            "keeps none"
        )


def show_parameters(parts: Sequence[Mapping[str, Any]]) -> tuple[str, Table]:
    """A sentence and a table about "parameters" of run.json, whose fields may be missing."""
    names = {"trainable": "trainable", "frozen": "frozen", "without_gradient": "without gradient"}
    counts = [{name: int(number(part.get(name)) or 0) for name in names} for part in parts]
    totals = {name: sum(count[name] for count in counts) for name in names}
    shown = [name for name in names if name != "without_gradient" or totals[name]]
    columns = [Column("part", "name"), *(Column(names[name], "number") for name in shown), Column("dtype", "soft")]
    rows = [
        (str(part.get("part", "–")), *(format_count(count[name]) for name in shown), str(part.get("dtype", "–")))
        for part, count in zip(parts, counts, strict=True)
    ]
    text = f"{large_count(totals['trainable'])} of {large_count(sum(totals.values()))} parameters are trainable."
    if totals["without_gradient"]:
        text += " Those without gradient are not frozen, but the loss does not depend on them."
    return text, Table(columns, rows, ("all", *(format_count(totals[name]) for name in shown), ""))


def _describe_weights(console: Console, info: Mapping[str, Any], first_step: int) -> None:
    init = info["init"]
    if first_step:
        frozen = f"; frozen weights: {init['source']}" if any(part["frozen"] for part in info["parameters"]) else ""
        console.print(f"weights: checkpoint at step {first_step}{frozen}")
        return
    if isinstance(fresh := init["fresh"], int):  # nothing was loaded
        fresh_text = f"{fresh} fresh"
    elif all(map(is_lora, fresh)):
        fresh_text = f"{len(fresh)} fresh: the LoRA matrices" if fresh else "none fresh"
    else:
        fresh_text = f"{len(fresh)} fresh: {first_of(fresh)}"
    console.print(f"weights: {init['source']}; {counted(init['loaded'], 'array')} loaded, {fresh_text}")
    for name, reason in init["left_out"].items():
        console.print(f"  left out: {name} ({reason})")
    if init["adapted"]:
        console.print(f"  {init['adapted']}")


def _describe_dataset(
    console: Console, config: TrainConfig, info: Mapping[str, Any], data: SourceData, share: float
) -> None:
    mixed = f", {100 * share:.3g} % of the samples" if share < 1 else ""
    epochs = config.num_steps * config.batch_size * share / info["frames"]
    console.print(
        f"data: {info['dataset']}, {info['embodiment']}{mixed}: {counted(info['frames'], 'frame')} of "
        f"{counted(info['episodes'], 'episode')}, {counted(info['holdout_episodes'], 'more is', 'more are')} held out; "
        f"{epochs:.1f} epochs"
    )
    if note := rate_note(data.train.fps, data.train.recorded_fps, data.embodiment):
        console.print(f"  {note}")
    blank = [index for index, text in data.train.tasks.items() if not text.strip()]
    without = int(np.isin(data.train.columns["task_index"][data.frames], blank).sum())
    if without:
        console.print(
            f"  warning: {without} of these frames have no instruction, and are trained with an empty one; prompt "
            "gives one to all, episodes leaves some out"
        )
