"""The training loop: one process, one state, from the dataset to a policy folder."""

import contextlib
import dataclasses
import json
import math
import pathlib
import signal
import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from torchpi.policy import Policy
from torchpi.randomness import generator_at
from torchpi.training.config import TrainConfig
from torchpi.training.curves import plot_curves, read_metrics
from torchpi.training.optim import clip_gradients, learning_rate, update_ema
from torchpi.training.samples import Batch, Draws, Samples, TrainingOrder
from torchpi.training.setup import Data, build_policy, open_data
from torchpi.training.state import WEIGHTS, TrainState, checkpoints, save_checkpoint

RECIPE, METRICS, CURVES = "train.json", "metrics.jsonl", "curves.png"


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run ended with."""

    policy: pathlib.Path
    """The policy folder of the last checkpoint."""
    step: int
    interrupted: bool
    """It ended by Ctrl-C and can be resumed."""


def train(config: TrainConfig, run: pathlib.Path, *, resume: bool = False) -> TrainResult:
    """Train a policy, or go on with a run.

    Args:
        config: the recipe; a run that is resumed has its own, see `resume_config`.
        run: the run's folder: train.json (the recipe), metrics.jsonl, curves.png, checkpoints/<step>/policy.
        resume: go on from the run's last checkpoint, as if it had not been interrupted.

    Raises:
        FileNotFoundError: no dataset, or nothing to resume.
        KeyError: the dataset has no such column or camera.
        ValueError: the run exists already; or recipe, dataset and robot do not fit together.
    """
    console = Console(stderr=True, highlight=False)
    if not resume and run.exists() and any(run.iterdir()):
        raise ValueError(f"{run} is not empty; choose another folder, or go on with it: torchpi train --resume {run}")
    data = open_data(config)
    policy = build_policy(config, data)
    state = TrainState.begin(policy.model, weight_decay=config.weight_decay, ema=config.ema_decay > 0)
    if resume:
        last = checkpoints(run)[-1]
        state.load(last / WEIGHTS, int(last.name))
        _drop_metrics_behind(run / METRICS, state.step)
    else:
        run.mkdir(parents=True, exist_ok=True)
        (run / RECIPE).write_text(config.to_json(), encoding="utf-8")
    _describe(console, config, data, policy)
    interrupted = _Trainer(config, run, policy, state, data).run(console)
    target = save_checkpoint(run, state, policy, keep=config.keep)
    plot_curves(run / METRICS, run / CURVES)
    return TrainResult(target / "policy", state.step, interrupted)


def resume_config(run: pathlib.Path) -> TrainConfig:
    """The recipe of a run.

    Raises:
        FileNotFoundError: there is no run, or it has no checkpoint yet.
    """
    if not checkpoints(run):
        raise FileNotFoundError(f"there is no checkpoint to go on from in {run / 'checkpoints'}")
    return TrainConfig.from_json(run / RECIPE)


def _drop_metrics_behind(path: pathlib.Path, step: int) -> None:
    """The interrupted run may have got further than its last checkpoint."""
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")


def _describe(console: Console, config: TrainConfig, data: Data, policy: Policy) -> None:
    parts: dict[str, int] = {}
    for name, parameter in policy.model.named_parameters():
        part = name.split(".")[0]
        parts[part] = parts.get(part, 0) + parameter.numel()
    held = len(data.holdout.episode_lengths) if data.holdout else 0
    frames = len(data.train)
    console.print(
        f"{'π₀.₅' if policy.model.config.pi05 else 'π₀'}, {sum(parts.values()) / 1e6:.2f} M parameters, all trained: "
        + ", ".join(f"{name} {count / 1e6:.2f}" for name, count in parts.items())
    )
    console.print(
        f"{frames} frames of {len(data.train.episode_lengths)} episodes, {held} more are held out; "
        f"{config.num_steps} steps of {config.batch_size} samples × {config.num_draws} draws: "
        f"{config.num_steps * config.batch_size / frames:.1f} epochs"
    )


def update(state: TrainState, config: TrainConfig, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
    """One update of the weights and of their average, in the order of the original.

    Returns:
        The loss before the update, still on the device; the norm of the gradient before it is cut; the learning rate.

    Raises:
        ValueError: the gradient is NaN or infinite; the weights are as they were.
    """
    parameters = list(state.model.parameters())
    rate = learning_rate(
        state.step,
        peak=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=config.decay_steps or config.num_steps,
        final=config.final_learning_rate,
    )
    loss = _loss(state, batch)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    grad_norm = clip_gradients(parameters, config.max_grad_norm)
    if not math.isfinite(grad_norm):
        raise ValueError(
            f"the gradient at step {state.step} has the norm {grad_norm} (loss {loss.item():g}); nothing of this step "
            "is kept. Lower the learning rate, or look for extreme values in the dataset: torchpi stats"
        )
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.step()
    if state.ema:
        update_ema(list(state.ema.values()), parameters, config.ema_decay)
    state.step += 1
    return loss.detach(), {"grad_norm": grad_norm, "learning_rate": rate}


def _loss(state: TrainState, batch: Batch) -> torch.Tensor:
    return state.model.compute_loss(batch.observation, batch.actions, noise=batch.noise, time=batch.time).mean()


class _Trainer:
    """The loop over the updates; what it needs between them is in `state`."""

    def __init__(self, config: TrainConfig, run: pathlib.Path, policy: Policy, state: TrainState, data: Data) -> None:
        self.config, self.run_folder, self.policy, self.state = config, run, policy, state
        draws = Draws(config.seed, config.num_draws, config.state_noise, config.augmentation)
        self.samples = Samples(data.train, data.embodiment, policy.transforms, draws)
        order = TrainingOrder(len(data.train), config.batch_size, config.seed, state.step, config.num_steps)
        self.batches = self.samples.batches(order, config.workers)
        self.holdout = [] if data.holdout is None else self._holdout_batches(data)

    def _holdout_batches(self, data: Data) -> list[Batch]:
        """The same samples with the same draws each time, without augmentation."""
        assert data.holdout is not None
        size, count = self.config.batch_size, min(self.config.holdout_samples, len(data.holdout))
        samples = Samples(data.holdout, data.embodiment, self.policy.transforms, Draws(self.config.seed, 4))
        frames = generator_at(self.config.seed, "holdout frames").permutation(len(data.holdout))[:count].tolist()
        # No step of training has this number, so none has these draws.
        places = [
            [(frame, 1 << 40, i) for i, frame in enumerate(frames)][at : at + size] for at in range(0, count, size)
        ]
        return [samples.finish(batch, self.config.device) for batch in samples.batches(places, 0)]

    def run(self, console: Console) -> bool:
        """Update until the last step; whether Ctrl-C ended it before."""
        config, state = self.config, self.state
        columns = (
            BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn(compact=True)
        )  # fmt: skip
        mean_loss = torch.zeros((), device=config.device)
        since, samples_since = time.perf_counter(), 0
        with _StopRequest() as stop, Progress(*columns, console=console) as progress:
            bar = progress.add_task("", total=config.num_steps, completed=state.step)
            while state.step < config.num_steps and not stop.requested:
                loss, numbers = update(state, config, self.samples.finish(next(self.batches), config.device))
                mean_loss += loss
                samples_since += config.batch_size
                line: dict[str, Any] = {}
                if state.step % config.log_every == 0 or state.step == config.num_steps:
                    speed = samples_since / (time.perf_counter() - since)
                    steps = samples_since / config.batch_size
                    line = {"loss": float(mean_loss) / steps, **numbers, "samples_per_second": round(speed, 1)}
                    progress.update(bar, description=f"loss {line['loss']:.4f}, {speed:.0f} samples/s")
                if state.step % config.eval_every == 0 or state.step == config.num_steps:
                    line |= self._holdout_loss()
                if line:
                    self._log(line)
                    mean_loss.zero_()
                    since, samples_since = time.perf_counter(), 0
                if state.step % config.save_every == 0:
                    save_checkpoint(self.run_folder, state, self.policy, keep=config.keep)
                    plot_curves(self.run_folder / METRICS, self.run_folder / CURVES)
                progress.update(bar, completed=state.step)
        return state.step < config.num_steps

    @torch.no_grad()
    def _holdout_loss(self) -> dict[str, float]:
        if not self.holdout:
            return {}
        with self.state.averaged_weights():
            losses = [_loss(self.state, batch) * len(batch.actions) for batch in self.holdout]
        return {"holdout_loss": float(sum(losses)) / sum(len(batch.actions) for batch in self.holdout)}

    def _log(self, values: dict[str, Any]) -> None:
        with (self.run_folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.state.step, **values}) + "\n")


class _StopRequest(contextlib.AbstractContextManager["_StopRequest"]):
    """While it is open, the first Ctrl-C asks to stop after the current update; a second one interrupts as usual."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "_StopRequest":
        self._before = signal.signal(signal.SIGINT, self._request)
        return self

    def _request(self, *_: Any) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self._before)

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, self._before)
