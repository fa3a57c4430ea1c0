"""The summary of a run before its first step: run.json, and the text printed from it."""

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

from torchpi.data.fit import require_normalizable_actions, stats_problems
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
from torchpi.training.run_folder import as_number
from torchpi.training.setup import SourceData
from torchpi.training.weights import InitReport, parameter_table
from torchpi.ui.format import format_count, large_count
from torchpi.ui.tables import Column, Table
from torchpi.version import __version__

_MAX_INITIAL_FRACTION = 0.5
"""A warning is printed if the final EMA weights keep a larger fraction of the initial ones."""


def run_document(
    config: TrainConfig, world: World, model: Pi0, init: InitReport, data: Sequence[SourceData]
) -> dict[str, Any]:
    """The document of run.json, written when the run starts or is resumed."""
    fresh = list(init.fresh) if init.loaded else len(init.fresh)
    return {
        "command": shlex.join([*sys.orig_argv[:1], *sys.argv]),
        "started": timestamp(),
        "torchpi": __version__,
        "torch": torch.__version__,
        "device": str(world.device),
        "world_size": world.size,
        "datasets": [
            {
                "dataset": source.config.dataset,
                "embodiment": source.embodiment.name,
                "weight": source.config.weight,
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


def timestamp() -> str:
    """The current time in the format of run.json."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def print_summary(
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
        info: the document of run.json.
        prompts: number of tokens of each task's longest prompt.
        first_step: step of the checkpoint from which the run is resumed; 0 for a new run, whose statistics are checked.
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
        if first_step:
            continue
        if source.config.norm_stats == "dataset":
            require_normalizable_actions(source.train, source.embodiment, policy.transforms)
        else:
            for problem in stats_problems(source.train, source.embodiment, policy.transforms):
                console.print(f"  warning: {problem}")
    own_stats = [source for source in data if source.config.norm_stats == "dataset"]
    for one, other in itertools.combinations(own_stats, 2):
        if len({(source.embodiment.state_names, source.embodiment.action_names) for source in (one, other)}) == 1:
            console.print(
                f"  note: {one.config.dataset} and {other.config.dataset} have the same state and actions, but "
                "each its own statistics, like two robots; if they are one: torchpi data merge, or a file as norm_stats"
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
        if config.model.dtype == "bfloat16":
            console.print(f"  warning: {emulated}: --dtype float32")
        else:
            console.print(f"matmuls in float32: {emulated}")
    _warn_of_short_run(console, config)


def _warn_of_short_run(console: Console, config: TrainConfig) -> None:
    """Warn if the run is shorter than the warm-up, or too short for the EMA to forget the initial weights."""
    optim, steps = config.optim, config.num_steps
    if steps <= optim.warmup_steps:
        console.print(
            f"  warning: warmup_steps {optim.warmup_steps} is not below num_steps {steps}: the learning rate reaches "
            f"{learning_rate(steps - 1, optim, steps):.2g}, not lr {optim.lr:g}; to reach it, pass --warmup-steps "
            f"{steps // 30} (num_steps / 30, as in openpi)"
        )
    if (end := optim.decay_steps or steps) < steps and optim.lr_schedule == "cosine":
        console.print(f"  note: the learning rate stays at min_lr {optim.min_lr:g} from decay_steps {end} on")
    initial_fraction = optim.ema_decay**steps
    if initial_fraction > _MAX_INITIAL_FRACTION:
        console.print(
            f"  warning: the EMA weights of the saved policy keep {100 * initial_fraction:.0f} % of the initial ones "
            f"after {counted(steps, 'step')} (ema_decay {optim.ema_decay:g}); --ema-decay {max(0, 1 - 10 / steps):.3g} "
            "keeps none"
        )


def show_parameters(parts: Sequence[Mapping[str, Any]]) -> tuple[str, Table]:
    """Summarize "parameters" of run.json, whose fields may be missing, in a sentence and a table."""
    names = {"trainable": "trainable", "frozen": "frozen", "without_gradient": "without gradient"}
    counts = [{name: int(as_number(part.get(name)) or 0) for name in names} for part in parts]
    totals = {name: sum(count[name] for count in counts) for name in names}
    shown = [name for name in names if name != "without_gradient" or totals[name]]
    columns = [Column("part", "name"), *(Column(names[name], "number") for name in shown), Column("dtype", "soft")]
    rows = [
        (str(part.get("part", "–")), *(format_count(count[name]) for name in shown), str(part.get("dtype", "–")))
        for part, count in zip(parts, counts, strict=True)
    ]
    text = f"{large_count(totals['trainable'])} of {large_count(sum(totals.values()))} parameters are trainable."
    if totals["without_gradient"]:
        text += " Parameters without gradient are not frozen, but the loss does not depend on them."
    return text, Table(columns, rows, ("all", *(format_count(totals[name]) for name in shown), ""))


def _describe_weights(console: Console, info: Mapping[str, Any], first_step: int) -> None:
    init = info["init"]
    if first_step:
        has_frozen = any(part["frozen"] for part in info["parameters"])
        frozen = f"; frozen weights: {init['source']}" if has_frozen else ""
        console.print(f"weights: checkpoint at step {first_step}{frozen}")
        return
    fresh = init["fresh"]
    if isinstance(fresh, int):  # nothing was loaded
        fresh_text = f"{fresh} fresh"
    elif not fresh:
        fresh_text = "none fresh"
    elif all(map(is_lora, fresh)):
        fresh_text = f"{len(fresh)} fresh: the LoRA matrices"
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
    blank_tasks = [index for index, text in data.train.tasks.items() if not text.strip()]
    num_blank = int(np.isin(data.train.columns["task_index"][data.frames], blank_tasks).sum())
    if num_blank:
        console.print(
            f"  warning: {num_blank} of these frames have no instruction, and are trained with an empty one; prompt "
            "sets one for all, episodes selects others"
        )
