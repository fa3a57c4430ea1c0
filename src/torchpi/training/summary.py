"""What a run is going to do, for people before its first step and for its report."""

import dataclasses
import datetime
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import torchpi
from torchpi.model.lora import is_lora
from torchpi.model.pi0 import Pi0
from torchpi.training.config import TrainConfig
from torchpi.training.distributed import World
from torchpi.training.setup import SourceData
from torchpi.training.weights import Beginning, table

_LISTED = 8


def describe(
    console: Console,
    config: TrainConfig,
    world: World,
    model: Pi0,
    beginning: Beginning,
    data: Sequence[SourceData],
    prompts: Mapping[str, int],
) -> None:
    """Print the model, what is trained of it, where its weights come from, and the data.

    Args:
        prompts: tokens of each task's longest prompt.
    """
    rows = table(model, config)
    total = sum(row.trainable + row.frozen + row.without_gradient for row in rows)
    trained = sum(row.trainable for row in rows)
    console.print(
        f"{'π₀.₅' if model.config.pi05 else 'π₀'}, {_millions(total)} M parameters, {_millions(trained)} M trained "
        f"({config.model.finetune}):"
    )
    shown = Table("part", "trained, M", "frozen, M", "no gradient, M", "dtype", box=None, header_style="dim")
    for row in rows:
        counts = (row.trainable, row.frozen, row.without_gradient)
        shown.add_row(row.part, *(_millions(count) if count else "–" for count in counts), row.dtype)
    console.print(shown)
    console.print(f"weights: {beginning.source}; {_listed('loaded', beginning.loaded)}{_fresh(beginning)}")
    for name, reason in beginning.left_out.items():
        console.print(f"  left out: {name} ({reason})")
    if beginning.adapted:
        console.print(f"  {beginning.adapted}")
    weights = sum(source.source.weight for source in data)
    for source in data:
        held = len(source.holdout.episode_lengths) if source.holdout else 0
        share = source.source.weight / weights
        samples = config.num_steps * config.batch_size * share
        mixed = f", {100 * share:.3g} % of the samples" if len(data) > 1 else ""
        console.print(
            f"data: {source.source.dataset}, {source.embodiment.name}{mixed}: {len(source.frames)} frames of "
            f"{len(source.train.episode_lengths)} episodes, {held} more are held out; "
            f"{samples / len(source.frames):.1f} epochs"
        )
        if without := _without_instruction(source):
            console.print(
                f"  warning: {without} of these frames have no instruction, and are trained with an empty one; prompt "
                "gives one to all, episodes leaves some out"
            )
    longest = max(prompts, key=lambda text: prompts[text])
    limit = model.config.max_token_len or "any number of"
    console.print(f"prompts: at most {prompts[longest]} of {limit} tokens ({longest!r})")
    draws = f"{config.optim.flow_samples_per_obs} draw{'s' if config.optim.flow_samples_per_obs > 1 else ''}"
    console.print(
        f"{config.num_steps} steps of {config.batch_size} samples × {draws}, in {world.size} "
        f"process{'es' if world.size > 1 else ''} ({config.parallel.strategy}) and {config.grad_accum_steps} "
        f"pass{'es' if config.grad_accum_steps > 1 else ''}"
    )


def _without_instruction(source: SourceData) -> int:
    """How many of the frames that are trained on."""
    if source.source.prompt is not None:
        return 0
    blank = [index for index, text in source.train.tasks.items() if not text.strip()]
    return int(np.isin(source.train.columns["task_index"][source.frames], blank).sum())


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f}"


def _listed(what: str, names: Sequence[str]) -> str:
    return f"{len(names)} arrays {what}"


def _fresh(beginning: Beginning) -> str:
    fresh = beginning.fresh
    if not fresh or not beginning.loaded:
        return f", {len(fresh)} fresh" if fresh else ", none fresh"
    if all(map(is_lora, fresh)):
        return f", {len(fresh)} fresh: the LoRA matrices"
    more = f" and {len(fresh) - _LISTED} more" if len(fresh) > _LISTED else ""
    return f", {len(fresh)} fresh: {', '.join(fresh[:_LISTED])}{more}"


def run_document(
    config: TrainConfig, world: World, model: Pi0, beginning: Beginning, data: Sequence[SourceData]
) -> dict[str, Any]:
    """run.json: how the run was begun, or gone on with for the last time."""
    return {
        "command": shlex.join([*sys.orig_argv[:1], *sys.argv]),
        "started": now(),
        "torchpi": torchpi.__version__,
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
        "parameters": [dataclasses.asdict(row) for row in table(model, config)],
        "init": {
            "source": beginning.source,
            "loaded": len(beginning.loaded),
            "fresh": list(beginning.fresh) if beginning.loaded else len(beginning.fresh),
            "left_out": dict(beginning.left_out),
            "adapted": beginning.adapted,
            "constant_sha256": beginning.constant,
        },
    }


def now() -> str:
    """The time, as run.json has it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
