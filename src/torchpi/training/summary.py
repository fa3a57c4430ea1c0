"""The summary of a run before its first step, printed and for its report."""

import dataclasses
import datetime
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console

from torchpi.model.lora import is_lora
from torchpi.model.pi0 import Pi0
from torchpi.training.config import TrainConfig
from torchpi.training.distributed import World
from torchpi.training.setup import SourceData
from torchpi.training.weights import InitReport, parameter_table
from torchpi.ui.tables import Column, Table
from torchpi.version import __version__

_LISTED = 8


def describe(
    console: Console,
    config: TrainConfig,
    world: World,
    model: Pi0,
    init: InitReport,
    data: Sequence[SourceData],
    prompts: Mapping[str, int],
    first_step: int = 0,
) -> None:
    """Print the model, its trained parameters and initial weights, and the data.

    Args:
        prompts: tokens of each task's longest prompt.
        first_step: that of the checkpoint from which the run is resumed; 0: it begins.
    """
    rows = parameter_table(model, config)
    total = sum(sum(row.counts) for row in rows)
    trained = sum(row.trainable for row in rows)
    console.print(
        f"{model.config.variant}, {total / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained "
        f"({config.model.finetune}):"
    )
    numbers = [Column(f"{title}, M", "number") for title in ("trained", "frozen", "no gradient")]
    cells = [(row.part, *(f"{count / 1e6:.2f}" if count else "–" for count in row.counts), row.dtype) for row in rows]
    console.print(Table([Column("part", "name"), *numbers, Column("dtype", "name")], cells).to_rich())
    if first_step:
        frozen = f"; frozen weights: {init.source}" if any(row.frozen for row in rows) else ""
        console.print(f"weights: checkpoint at step {first_step}{frozen}")
    else:
        console.print(f"weights: {init.source}; {len(init.loaded)} arrays loaded, {_fresh(init)}")
        for name, reason in init.left_out.items():
            console.print(f"  left out: {name} ({reason})")
        if init.adapted:
            console.print(f"  {init.adapted}")
    weights = sum(source.source.weight for source in data)
    for source in data:
        _describe_source(console, config, source, source.source.weight / weights)
    longest = max(prompts, key=lambda text: prompts[text])
    limit = model.config.max_token_len or "any number of"
    console.print(f"prompts: at most {prompts[longest]} of {limit} tokens ({longest!r})")
    console.print(
        f"{config.num_steps} steps of {config.batch_size} samples × {flow_samples(config)}, in "
        f"{world.size} process{'es' if world.size > 1 else ''} ({config.parallel.strategy}) and "
        f"{config.grad_accum_steps} micro-batch{'es' if config.grad_accum_steps > 1 else ''}"
    )


def _describe_source(console: Console, config: TrainConfig, source: SourceData, share: float) -> None:
    held_out = len(source.holdout.episode_lengths) if source.holdout else 0
    are = "is" if held_out == 1 else "are"
    mixed = f", {100 * share:.3g} % of the samples" if share < 1 else ""
    epochs = config.num_steps * config.batch_size * share / len(source.frames)
    console.print(
        f"data: {source.source.dataset}, {source.embodiment.name}{mixed}: {len(source.frames)} frames of "
        f"{len(source.train.episode_lengths)} episodes, {held_out} more {are} held out; {epochs:.1f} epochs"
    )
    blank = [index for index, text in source.train.tasks.items() if not text.strip()]
    without = int(np.isin(source.train.columns["task_index"][source.frames], blank).sum())
    if without and source.source.prompt is None:
        console.print(
            f"  warning: {without} of these frames have no instruction, and are trained with an empty one; prompt "
            "gives one to all, episodes leaves some out"
        )


def flow_samples(config: TrainConfig) -> str:
    """The number of flow samples per observation, in words."""
    number = config.optim.flow_samples_per_obs
    return f"{number} flow sample{'s' if number > 1 else ''}"


def _fresh(init: InitReport) -> str:
    fresh = init.fresh
    if not fresh:
        return "none fresh"
    if not init.loaded:
        return f"{len(fresh)} fresh"
    if all(map(is_lora, fresh)):
        return f"{len(fresh)} fresh: the LoRA matrices"
    more = f" and {len(fresh) - _LISTED} more" if len(fresh) > _LISTED else ""
    return f"{len(fresh)} fresh: {', '.join(fresh[:_LISTED])}{more}"


def run_document(
    config: TrainConfig, world: World, model: Pi0, init: InitReport, data: Sequence[SourceData]
) -> dict[str, Any]:
    """run.json: the start of the run, or its last resume."""
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
                "frames": len(source.frames),
                "episodes": len(source.train.episode_lengths),
                "holdout_episodes": len(source.holdout.episode_lengths) if source.holdout else 0,
                "held_out": list(source.holdout.episode_indices) if source.holdout else [],
                "tasks": sorted(source.train.tasks.values()),
            }
            for source in data
        ],
        "parameters": [dataclasses.asdict(row) for row in parameter_table(model, config)],
        "init": {
            "source": init.source,
            "loaded": len(init.loaded),
            "fresh": list(init.fresh) if init.loaded else len(init.fresh),
            "left_out": dict(init.left_out),
            "adapted": init.adapted,
            "frozen_sha256": init.frozen_sha256,
        },
    }


def now() -> str:
    """The time, as run.json has it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
