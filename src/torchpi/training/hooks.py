"""Hooks of a run, called after each update: metrics, checkpoints, simulation, curves. `Holdout` is another one."""

import contextlib
import dataclasses
import json
import pathlib
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import safetensors.torch
import torch

from torchpi.errors import TrainingError
from torchpi.training.checkpointer import Checkpointer
from torchpi.training.config import TrainConfig
from torchpi.training.curves import plot_curves
from torchpi.training.distributed import Parallel, World
from torchpi.training.metrics import METRICS, scalars
from torchpi.training.optim import global_norm
from torchpi.training.samples import Batch
from torchpi.training.state import TrainState
from torchpi.training.trackers import Tracker

CURVES = "curves.png"


@dataclasses.dataclass
class LiveRun:
    """A run in progress."""

    config: TrainConfig
    folder: pathlib.Path
    world: World
    state: TrainState
    parallel: Parallel
    tracker: Tracker
    resumed: bool
    """Resumed, and no line of metrics.jsonl says so yet."""
    stopped: bool = False
    """A signal has asked to stop after the current update."""
    note: str = ""
    """Text next to the progress bar."""

    def __post_init__(self) -> None:
        self.meter = Meter(self.config.batch_size)

    @property
    def complete(self) -> bool:
        """All updates are done."""
        return self.state.step >= self.config.num_steps

    def is_due(self, every: int, *, at_stop: bool = True) -> bool:
        """True at multiples of `every`, and at the last step."""
        return self.state.step % every == 0 or self.complete or (self.stopped and at_stop)

    def log(self, values: Mapping[str, Any]) -> None:
        """Write a line of metrics.jsonl, and its numbers to the trackers."""
        if self.world.is_main and values:
            line = {"step": self.state.step, **values} | ({"resumed": True} if self.resumed else {})
            self.resumed = False
            with (self.folder / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self.tracker.log(self.state.step, scalars(line))

    @contextlib.contextmanager
    def keep_failed(self, batches: Sequence[Batch]) -> Iterator[None]:
        """Save the micro-batches of an update whose gradient is not finite."""
        try:
            yield
        except FloatingPointError as error:
            files = []
            for number, batch in enumerate(batches):
                name = f"failed_step_{self.state.step:08d}_process_{self.world.rank}_micro_batch_{number}.safetensors"
                files.append(self.folder / name)
                tensors = {key: value.detach().cpu().contiguous() for key, value in batch.to_tensors().items()}
                safetensors.torch.save_file(tensors, files[-1])
            raise TrainingError(
                f"{str(error).rstrip('.')}; nothing of this step is kept. Its batch is in "
                f"{', '.join(map(str, files))}. Lower the learning rate, or look for extreme values: torchpi stats."
            ) from error


class Meter:
    """The mean loss and the speed since the last line of metrics.jsonl."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._restart()

    def _restart(self) -> None:
        self.since, self.waited, self.losses = time.perf_counter(), 0.0, list[float]()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of a block as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of a block that is no part of an update."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def add(self, loss: float, numbers: Mapping[str, float]) -> None:
        """Add the loss of an update; its other numbers are logged as they are."""
        self.losses.append(loss)
        self.numbers = numbers

    def line(self) -> dict[str, float]:
        """The measurements since the last line."""
        seconds = time.perf_counter() - self.since
        line = {
            "loss": sum(self.losses) / len(self.losses),
            "samples_per_second": round(self.batch_size * len(self.losses) / seconds, 1),
            "data_wait": round(self.waited / seconds, 4),
            **self.numbers,
        }
        self._restart()
        return line


class StopRequest(contextlib.AbstractContextManager["StopRequest"]):
    """While it is open, the first Ctrl-C or SIGTERM asks to stop after the current update; a second Ctrl-C interrupts
    as usual."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _request(self, *_: Any) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])

    def __exit__(self, *_: Any) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)


class Hook(Protocol):
    """Acts on a run after an update."""

    def after_step(self, run: LiveRun) -> Mapping[str, Any]:
        """Act, and return what is logged: {} where the hook is not due."""


class LogMetrics:
    """Loss, norms, speed and memory."""

    def __init__(self, epoch_frames: int) -> None:
        self.epoch_frames = epoch_frames

    def after_step(self, run: LiveRun) -> Mapping[str, Any]:
        if not run.is_due(run.config.log_every):
            return {}
        line = run.meter.line()
        run.note = (
            f"loss {line['loss']:.4f}, gradient {line['grad_norm']:.2f}, lr {line['lr']:.0e}, "
            f"{line['samples_per_second']:.3g}/s, {100 * line['data_wait']:.0f} % waiting"
        )
        kernels = [  # openpi's param_norm is of the kernels
            parameter
            for name, parameter in run.state.trainable.items()
            if parameter.ndim > 1 and name not in ("embedding", "vision.pos_embed")
        ]
        line["param_norm"] = float(global_norm(kernels))
        line["epoch"] = run.state.step * run.config.batch_size / self.epoch_frames
        if run.world.device.type == "cuda":
            line["memory"] = float(torch.cuda.max_memory_allocated(run.world.device))
        return line


class SaveCheckpoint:
    """Checkpoints, and with `env` the success of each saved policy in simulation."""

    def __init__(self, checkpointer: Checkpointer) -> None:
        self.checkpointer = checkpointer

    def after_step(self, run: LiveRun) -> Mapping[str, Any]:
        if not run.is_due(run.config.checkpoint.save_every):
            return {}
        target = self.checkpointer.save(run.state)
        simulate = run.config.eval.env is not None and not run.stopped
        if run.complete or run.stopped or simulate:
            self.checkpointer.wait()
        if not simulate:
            return {}
        success = _simulate(run.config, target / "policy") if run.world.is_main else {}
        run.world.barrier()  # a collective of the training does not wait for so long
        return success


def _simulate(config: TrainConfig, policy: pathlib.Path) -> dict[str, Any]:
    from torchpi.sim.evaluate import evaluate  # brings the simulator

    assert config.eval.env is not None
    tasks = None if config.eval.env_tasks is None else config.eval.env_tasks.split(",")
    result = evaluate(
        str(policy), config.eval.env, tasks=tasks, episodes=config.eval.env_episodes, seed=config.seed
    ).to_dict()
    return {"success_rate": result["success_rate"], "success": result["tasks"]}


class PlotCurves:
    """curves.png, drawn with each checkpoint."""

    def after_step(self, run: LiveRun) -> Mapping[str, Any]:
        if run.world.is_main and run.is_due(run.config.checkpoint.save_every):
            plot_curves(run.folder / METRICS, run.folder / CURVES)
        return {}
