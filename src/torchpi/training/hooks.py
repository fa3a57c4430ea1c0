"""A run in progress, and the hooks called after each update: metrics, checkpoints, evaluation, curves."""

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
# Beyond all training steps, so that held-out samples share no random numbers with them.
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
    """Number of frames to train on."""
    resumed: bool
    """True until the first line of metrics.jsonl after a resume is written."""
    stopped: bool = False
    """True once a signal has requested a stop after the current update."""
    note: str = ""
    """Text beside the progress bar."""
    losses: list[float] = dataclasses.field(default_factory=list)
    """Losses of the updates since the last logged metrics."""
    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: {"data": 0.0, "update": 0.0})
    """Seconds spent on these updates, and on waiting for their data."""
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Gradient norm and learning rate of the last update."""

    @property
    def complete(self) -> bool:
        """True if all updates are done."""
        return self.state.step >= self.config.num_steps

    def is_due(self, every: int, *, at_stop: bool = True) -> bool:
        """True at multiples of `every`, at the last step, and (with `at_stop`) if the run was asked to stop."""
        return self.state.step % every == 0 or self.complete or (self.stopped and at_stop)

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the duration of a `with` block to `seconds[part]`."""
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start

    def log(self, values: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl, and send its numbers to the trackers."""
        if not self.world.is_main or not values:
            return
        line = {"step": self.state.step, **values}
        if self.resumed:
            line["resumed"], self.resumed = True, False
        path = self.folder / METRICS
        with naming(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.trackers.log(self.state.step, scalars(line))

    @contextlib.contextmanager
    def save_failed(self, batches: Sequence[Batch]) -> Iterator[None]:
        """Save the micro-batches of an update whose gradient is not finite, and raise an error that names the files."""
        try:
            yield
        except FloatingPointError as error:
            prefix = f"failed_step_{self.state.step:08d}_process_{self.world.rank}_micro_batch"
            files = [self.folder / f"{prefix}_{i}.safetensors" for i in range(len(batches))]
            for file, batch in zip(files, batches, strict=True):
                tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in batch.to_tensors().items()}
                safetensors.torch.save_file(tensors, file)
            raise TrainingError(
                f"{str(error).rstrip('.')}; nothing of this step is kept. Its batch is in "
                f"{', '.join(map(str, files))}. Lower the learning rate, or look for extreme values: torchpi stats."
            ) from error


@contextlib.contextmanager
def stop_request() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop; a second Ctrl-C interrupts as usual.

    Yields:
        A function that returns True once a stop was requested.
    """
    received: list[int] = []

    def receive(number: int, _: Any) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, previous[signal.SIGINT])

    previous = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


Hook = Callable[[LiveRun], Mapping[str, Any]]
"""A function called after each update. It returns the values to log, or {} if it is not due."""


def log_metrics(run: LiveRun) -> Mapping[str, Any]:
    """Log the loss, norms, speed and memory."""
    if not run.is_due(run.config.log_every):
        return {}
    seconds = sum(run.seconds.values())
    kernels = [  # like openpi's param_norm, which leaves out biases, scales and embeddings
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
    )
    if "mfu" in line:
        run.note += f", {100 * line['mfu']:.0f} % MFU"
    run.losses, run.seconds = [], dict.fromkeys(run.seconds, 0.0)
    return line


def save_checkpoint(run: LiveRun) -> Mapping[str, Any]:
    """Save a checkpoint, and with `env` evaluate the saved policy in simulation."""
    if not run.is_due(run.config.checkpoint.save_every):
        return {}
    checkpoint = run.checkpointer.save(run.state)
    simulate = run.config.eval.env is not None and not run.stopped
    if run.complete or run.stopped or simulate:
        run.checkpointer.wait()
    if not simulate:
        return {}
    success = _simulate(run.config, checkpoint / "policy") if run.world.is_main else {}
    run.world.barrier()  # with its long timeout: the collectives of the training would give up earlier
    return success


def _simulate(config: TrainConfig, policy: pathlib.Path) -> dict[str, Any]:
    from torchpi.sim.evaluate import evaluate  # imports the simulator

    options = config.eval
    assert options.env is not None
    result = evaluate(
        str(policy), options.env, tasks=options.tasks, episodes=options.env_episodes, seed=config.seed
    ).to_dict()
    return {"success_rate": result["success_rate"], "success": result["tasks"]}


def draw_curves(run: LiveRun) -> Mapping[str, Any]:
    """Draw curves.png with each checkpoint."""
    if run.world.is_main and run.is_due(run.config.checkpoint.save_every):
        plot_curves(run.folder / METRICS, run.folder / CURVES)
    return {}


class Holdout:
    """The hook that evaluates the EMA weights on held-out samples: loss and chunk errors.

    Every evaluation uses the same samples with the same noise, without augmentation.
    """

    def __init__(self, run: LiveRun, data: Sequence[SourceData], policies: Sequence[Policy]) -> None:
        self.config, self.world, self.policies, self.data = run.config, run.world, policies, data
        self.batch_size = self.config.micro_batch_size(self.world.size)
        """Samples that this process evaluates at once: as many as in training, so that they fit in memory."""
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
        """All recorded actions of each dataset; chunk errors are relative to their ranges."""

    def _prepare(self, frames: Sequence[Frames]) -> Iterator[tuple[dict[str, Any], bool]]:
        """Collate this process's share of each batch; images stay uint8.

        Yields:
            A batch, and False if the batch only fills up: every process needs the same number of batches.
        """
        indices: list[SampleIndex] = []
        for source, part in enumerate(frames):
            rng = generator_at(self.config.seed, "holdout frames", source)
            chosen = rng.permutation(part.dataset.new_images)[: self.config.eval.holdout_samples // len(frames)]
            indices += [(source, int(frame), _HOLDOUT_STEP, len(indices) + i) for i, frame in enumerate(chosen)]
        for start in range(0, len(indices), self.batch_size * self.world.size):
            share = indices[start + self.world.rank * self.batch_size :][: self.batch_size]
            yield self._samples.collate([self._samples[index] for index in share or indices[:1]]), bool(share)

    def after_step(self, run: LiveRun) -> Mapping[str, Any]:
        """Evaluate the EMA weights if due."""
        if not run.is_due(run.config.eval.eval_every, at_stop=False):  # a stop should not wait for an evaluation
            return {}
        # Eager: the evaluation has other shapes than the training, and each would have to be compiled.
        with run.state.ema_weights() as model, torch.compiler.set_stance("force_eager"):
            model.eval()
            values = {**self._loss(run), **self._chunks(run)}
            model.train()
        return values

    @torch.no_grad()
    def _loss(self, run: LiveRun) -> dict[str, float]:
        """Mean flow-matching loss of the held-out samples."""
        if not self._batches:
            return {}
        total = {"loss": 0.0, "elements": 0.0}
        for collated, counts in self._batches:
            batch = self._samples.finish(collated, self.world.device)
            batch_loss = loss_sum(run.parallel.forward, batch, self.config.optim.loss)
            if counts:
                total["loss"] += float(batch_loss)
                total["elements"] += int(num_loss_elements(batch, self.config.optim.loss))
        total = sum_over_processes(total)
        return {"holdout_loss": total["loss"] / total["elements"]}

    def _chunks(self, run: LiveRun) -> dict[str, Any]:
        """Errors of sampled chunks compared with the recorded ones; the main process plots both."""
        values: dict[str, Any] = {}
        seed, count = self.config.seed, self.config.eval.chunk_samples
        names = robot_names([policy.embodiment for policy in self.policies])
        for i, (policy, source, recorded) in enumerate(zip(self.policies, self.data, self._recorded, strict=True)):
            if source.holdout is None or not count:
                continue
            frames = sample_new_images(source.holdout, count, seed=seed)
            chunks = predict_chunks(policy, source.holdout, frames, seed=seed, batch_size=self.batch_size)
            errors = errors_of(chunks, recorded)
            dimensions = zip(errors.dimensions, errors.mae() / errors.ranges, strict=True)
            suffix = f"_{names[i]}" if i else ""
            values[f"chunk_error{suffix}"] = errors.overall().mae_scaled
            values[f"chunk_error_dims{suffix}"] = {dim.name: float(value) for dim, value in dimensions}
            values[f"chunk_error_steps{suffix}"] = [float(value) for value in errors.scaled_per_step()]
            if self.world.is_main:
                for kind, figure in (("chunks", plot_chunks(chunks)), ("errors", plot_errors(errors))):
                    path = run.folder / PLOTS / f"{run.state.step:08d}_{kind}{suffix}.png"
                    save_figure(figure, path, dpi=80)
                    run.trackers.image(run.state.step, f"{kind}{suffix}", path)
        return without_nan(values)
