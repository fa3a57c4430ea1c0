"""A run in progress, and its hooks, called after each update: metrics, checkpoints, evaluation, curves."""

import contextlib
import dataclasses
import json
import pathlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.torch
import torch

from torchpi.atomic import naming
from torchpi.data.format import ACTION
from torchpi.errors import TrainingError
from torchpi.evaluation.chunks import predict_chunks, sample_new_images
from torchpi.evaluation.errors import errors_of
from torchpi.evaluation.plots import plot_chunks, plot_errors
from torchpi.policy import Policy
from torchpi.randomness import generator_at
from torchpi.training.checkpointer import Checkpointer
from torchpi.training.config import TrainConfig
from torchpi.training.curves import plot_curves
from torchpi.training.distributed import Parallel, World, sum_over_processes
from torchpi.training.optim import global_norm
from torchpi.training.run_folder import METRICS, scalars
from torchpi.training.samples import Batch, Frames, SampleIndex, SampleRng, Samples, loss_sum, num_loss_elements
from torchpi.training.setup import SourceData, robot_names
from torchpi.training.state import TrainState
from torchpi.training.trackers import Trackers
from torchpi.training.utilization import Utilization
from torchpi.ui.format import without_nan
from torchpi.ui.plots import save_figure

CURVES, PLOTS = "curves.png", "plots"
FLOW_SAMPLES = 4
"""Pairs of noise and time per held-out sample."""
# No training step has this number, so none has these random numbers.
_HOLDOUT_STEP = 1 << 40


@dataclasses.dataclass
class LiveRun:
    """A run in progress."""

    config: TrainConfig
    folder: pathlib.Path
    world: World
    state: TrainState
    parallel: Parallel
    checkpointer: Checkpointer
    trackers: Trackers
    utilization: Utilization
    epoch_frames: int
    """Frames that are trained on."""
    resumed: bool
    """Resumed, and no line of metrics.jsonl says so yet."""
    stopped: bool = False
    """A signal has asked to stop after the current update."""
    note: str = ""
    """Text next to the progress bar."""
    losses: list[float] = dataclasses.field(default_factory=list)
    """Those since the last line of the metrics."""
    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: {"data": 0.0, "update": 0.0})
    """The time of the updates since then, and of waiting for their data."""
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Other numbers of the last update."""

    @property
    def complete(self) -> bool:
        """All updates are done."""
        return self.state.step >= self.config.num_steps

    def is_due(self, every: int, *, at_stop: bool = True) -> bool:
        """True at multiples of `every`, and at the last step."""
        return self.state.step % every == 0 or self.complete or (self.stopped and at_stop)

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time of a block to a part of `seconds`."""
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start

    def log(self, values: Mapping[str, Any]) -> None:
        """Write a line of metrics.jsonl, and its numbers to the trackers."""
        if self.world.is_main and values:
            line = {"step": self.state.step, **values} | ({"resumed": True} if self.resumed else {})
            self.resumed = False
            with naming(self.folder / METRICS), (self.folder / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self.trackers.log(self.state.step, scalars(line))

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


@contextlib.contextmanager
def stop_request() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C or SIGTERM ask to stop, which what is yielded tells; a second Ctrl-C interrupts as usual."""
    requested: list[int] = []

    def request(number: int, _: Any) -> None:
        requested.append(number)
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(requested)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


Hook = Callable[[LiveRun], Mapping[str, Any]]
"""Acts on a run after an update, and returns what is logged: {} where it is not due."""


def log_metrics(run: LiveRun) -> Mapping[str, Any]:
    """Loss, norms, speed and memory."""
    if not run.is_due(run.config.log_every):
        return {}
    seconds = sum(run.seconds.values())
    kernels = [  # openpi's param_norm is of the kernels
        parameter
        for name, parameter in run.state.trainable.items()
        if parameter.ndim > 1 and name not in ("embedding", "vision.pos_embed")
    ]
    line = {
        "loss": sum(run.losses) / len(run.losses),
        "samples_per_second": round(run.config.batch_size * len(run.losses) / seconds, 1),
        "data_wait": round(run.seconds["data"] / seconds, 4),
        **run.utilization.take(seconds),
        **run.numbers,
        "param_norm": float(global_norm(kernels)),
        "epoch": run.state.step * run.config.batch_size / run.epoch_frames,
    }
    if run.world.device.type == "cuda":
        line["memory"] = float(torch.cuda.max_memory_allocated(run.world.device))
    run.note = (
        f"loss {line['loss']:.4f}, gradient {line['grad_norm']:.2f}, lr {line['lr']:.0e}, "
        f"{line['samples_per_second']:.3g} samples/s, {100 * line['data_wait']:.0f} % waiting for data"
    ) + (f", {100 * line['mfu']:.0f} % MFU" if "mfu" in line else "")
    run.losses, run.seconds = [], dict.fromkeys(run.seconds, 0.0)
    return line


def save_checkpoint(run: LiveRun) -> Mapping[str, Any]:
    """Checkpoints, and with `env` the success of each saved policy in simulation."""
    if not run.is_due(run.config.checkpoint.save_every):
        return {}
    target = run.checkpointer.save(run.state)
    simulate = run.config.eval.env is not None and not run.stopped
    if run.complete or run.stopped or simulate:
        run.checkpointer.wait()
    if not simulate:
        return {}
    success = _simulate(run.config, target / "policy") if run.world.is_main else {}
    run.world.barrier()  # a collective of the training does not wait for so long
    return success


def _simulate(config: TrainConfig, policy: pathlib.Path) -> dict[str, Any]:
    from torchpi.sim.evaluate import evaluate  # brings the simulator

    options = config.eval
    assert options.env is not None
    result = evaluate(
        str(policy), options.env, tasks=options.tasks, episodes=options.env_episodes, seed=config.seed
    ).to_dict()
    return {"success_rate": result["success_rate"], "success": result["tasks"]}


def draw_curves(run: LiveRun) -> Mapping[str, Any]:
    """curves.png, drawn with each checkpoint."""
    if run.world.is_main and run.is_due(run.config.checkpoint.save_every):
        plot_curves(run.folder / METRICS, run.folder / CURVES)
    return {}


class Holdout:
    """The hook that evaluates the EMA weights on held-out samples: loss and chunk errors.

    The samples and their noise are always the same, without augmentation.
    """

    def __init__(self, run: LiveRun, data: Sequence[SourceData], policies: Sequence[Policy]) -> None:
        self.config, self.world, self.policies, self.data = run.config, run.world, policies, data
        self.batch_size = self.config.micro_batch_size(self.world.size)
        """Samples of this process at once, as many as in training, so that they fit in memory."""
        frames = [
            Frames(source.holdout, source.embodiment, policy.transforms)
            for source, policy in zip(data, policies, strict=True)
            if source.holdout is not None
        ]
        self._samples = Samples(frames, SampleRng(self.config.seed, FLOW_SAMPLES))
        self._batches = list(self._prepare(frames)) if frames else []
        self._recorded = [
            np.concatenate([part.columns[ACTION] for part in (source.train, source.holdout) if part is not None])
            for source in data
        ]
        """Actions of each dataset, whose ranges the errors are relative to."""

    def _prepare(self, frames: Sequence[Frames]) -> Iterator[tuple[dict[str, Any], bool]]:
        """This process' part of each batch, images as bytes, and whether it counts: all processes have as many."""
        indices: list[SampleIndex] = []
        for source, part in enumerate(frames):
            rng = generator_at(self.config.seed, "holdout frames", source)
            chosen = rng.permutation(part.dataset.new_images)[: self.config.eval.holdout_samples // len(frames)]
            indices += [(source, int(frame), _HOLDOUT_STEP, len(indices) + i) for i, frame in enumerate(chosen)]
        for at in range(0, len(indices), self.batch_size * self.world.size):
            own = indices[at + self.world.rank * self.batch_size :][: self.batch_size]
            yield self._samples.collate([self._samples[index] for index in own or indices[:1]]), bool(own)

    def after_step(self, run: LiveRun) -> Mapping[str, Any]:
        """Evaluate where it is due."""
        if not run.is_due(run.config.eval.eval_every, at_stop=False):  # at a stop somebody waits for the end
            return {}
        # Without compiled layers: its shapes are others than those of training, and each would be compiled.
        with run.state.ema_weights() as model, torch.compiler.set_stance("force_eager"):
            model.eval()
            numbers = {**self._loss(run), **self._chunks(run)}
            model.train()
        return numbers

    @torch.no_grad()
    def _loss(self, run: LiveRun) -> dict[str, float]:
        """The mean flow-matching loss."""
        if not self._batches:
            return {}
        total = {"loss": 0.0, "elements": 0.0}
        for stacked, counts in self._batches:
            batch = self._samples.finish(stacked, self.world.device)
            part = loss_sum(run.parallel.forward, batch, self.config.optim.loss)
            if counts:
                total["loss"] += float(part)
                total["elements"] += int(num_loss_elements(batch, self.config.optim.loss))
        total = sum_over_processes(total)
        return {"holdout_loss": total["loss"] / total["elements"]}

    def _chunks(self, run: LiveRun) -> dict[str, Any]:
        """Errors of sampled chunks compared with the recorded ones; the main process draws both."""
        numbers: dict[str, Any] = {}
        seed, count = self.config.seed, self.config.eval.chunk_samples
        names = robot_names([policy.embodiment for policy in self.policies])
        for number, (policy, source, recorded) in enumerate(zip(self.policies, self.data, self._recorded, strict=True)):
            if source.holdout is None or not count:
                continue
            chunks = predict_chunks(
                policy,
                source.holdout,
                sample_new_images(source.holdout, count, seed=seed),
                seed=seed,
                batch_size=self.batch_size,
            )
            errors = errors_of(chunks, recorded)
            dimensions = zip(errors.dimensions, errors.mae() / errors.ranges, strict=True)
            name = f"_{names[number]}" if number else ""
            numbers[f"chunk_error{name}"] = errors.overall().mae_scaled
            numbers[f"chunk_error_dims{name}"] = {dim.name: float(value) for dim, value in dimensions}
            numbers[f"chunk_error_steps{name}"] = [float(value) for value in errors.scaled_per_step()]
            if self.world.is_main:
                for kind, figure in (("chunks", plot_chunks(chunks)), ("errors", plot_errors(errors))):
                    path = run.folder / PLOTS / f"{run.state.step:08d}_{kind}{name}.png"
                    save_figure(figure, path, dpi=80)
                    run.trackers.image(run.state.step, f"{kind}{name}", path)
        return without_nan(numbers)
