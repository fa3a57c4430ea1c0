"""Evaluation on held-out episodes."""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from torchpi.evaluation.chunks import predict_chunks, sample_frames
from torchpi.evaluation.errors import errors_of
from torchpi.evaluation.plots import plot_chunks, plot_errors
from torchpi.policy import Policy
from torchpi.randomness import generator_at
from torchpi.training.config import TrainConfig
from torchpi.training.distributed import Forward, World, sum_over_processes
from torchpi.training.hooks import LiveRun
from torchpi.training.order import SampleIndex
from torchpi.training.samples import Frames, SampleRng, Samples, loss_sum, num_loss_elements
from torchpi.training.setup import SourceData, robot_names
from torchpi.ui.format import without_nan

PLOTS = "plots"
FLOW_SAMPLES = 4
"""Pairs of noise and time per held-out sample."""
# No training step has this number, so none has these random numbers.
_STEP = 1 << 40


class Holdout:
    """The hook that evaluates the EMA weights on held-out samples: loss and chunk errors.

    The samples and their noise are always the same, without augmentation.
    """

    def __init__(
        self, config: TrainConfig, world: World, data: Sequence[SourceData], policies: Sequence[Policy]
    ) -> None:
        self.config, self.world, self.policies, self.data = config, world, policies, data
        self.batch_size = config.micro_batch_size(world.size)
        """Of this process, as in training: what fits there fits here."""
        frames = [
            Frames(source.holdout, source.embodiment, policy.transforms, source.source.prompt)
            for source, policy in zip(data, policies, strict=True)
            if source.holdout is not None
        ]
        self._samples = Samples(frames, SampleRng(config.seed, FLOW_SAMPLES))
        self._batches = list(self._prepare(frames)) if frames else []

    def _prepare(self, frames: Sequence[Frames]) -> Iterator[tuple[dict[str, Any], bool]]:
        """This process' part of each batch, images as bytes, and whether it counts: all processes have as many."""
        indices: list[SampleIndex] = []
        for source, part in enumerate(frames):
            rng = generator_at(self.config.seed, "holdout frames", source)
            chosen = rng.permutation(len(part.dataset))[: self.config.eval.holdout_samples // len(frames)]
            indices += [(source, int(frame), _STEP, len(indices) + i) for i, frame in enumerate(chosen)]
        for at in range(0, len(indices), self.batch_size * self.world.size):
            own = indices[at + self.world.rank * self.batch_size :][: self.batch_size]
            yield self._samples.collate([self._samples[index] for index in own or indices[:1]]), bool(own)

    def after_step(self, run: LiveRun) -> Mapping[str, Any]:
        """Evaluate where it is due."""
        if not run.is_due(run.config.eval.eval_every, at_stop=False):  # at a stop somebody waits for the end
            return {}
        with run.state.ema_weights() as model:
            model.eval()
            numbers: dict[str, Any] = self.loss(run.parallel.forward)
            chunks, plots = self.chunks(run.folder, run.state.step)
            model.train()
        for name, path in plots.items():
            run.tracker.image(run.state.step, name, path)
        return numbers | chunks

    @torch.no_grad()
    def loss(self, forward: Forward) -> dict[str, float]:
        """The mean flow-matching loss."""
        if not self._batches:
            return {}
        total = {"loss": 0.0, "elements": 0.0}
        for stacked, counts in self._batches:
            batch = self._samples.finish(stacked, self.world.device)
            part = loss_sum(forward, batch, self.config.optim.loss)
            if counts:
                total["loss"] += float(part)
                total["elements"] += num_loss_elements(batch, self.config.optim.loss)
        total = sum_over_processes(total)
        return {"holdout_loss": total["loss"] / total["elements"]}

    def chunks(self, run: pathlib.Path, step: int) -> tuple[dict[str, Any], dict[str, pathlib.Path]]:
        """Sample chunks and compare them with the recorded ones.

        Returns:
            The numbers, and the plots that the main process has drawn.
        """
        numbers: dict[str, Any] = {}
        plots: dict[str, pathlib.Path] = {}
        names = robot_names([policy.embodiment for policy in self.policies])
        for number, (policy, source) in enumerate(zip(self.policies, self.data, strict=True)):
            if source.holdout is None or not self.config.eval.chunk_samples:
                continue
            seed, count = self.config.seed, self.config.eval.chunk_samples
            chunks = predict_chunks(
                policy,
                source.holdout,
                sample_frames(source.holdout.episode_lengths, count, seed=seed),
                seed=seed,
                batch_size=self.batch_size,
                prompt=source.source.prompt,
            )
            errors = errors_of(chunks, source.holdout.columns["action"])
            name = f"_{names[number]}" if number else ""
            scaled = errors.mae() / errors.ranges
            numbers |= {
                f"chunk_error{name}": errors.overall().mae_scaled,
                f"chunk_error_dims{name}": {
                    dim.name: float(value) for dim, value in zip(errors.dimensions, scaled, strict=True)
                },
                f"chunk_error_steps{name}": [float(value) for value in errors.scaled_per_step()],
            }
            if self.world.is_main:
                (run / PLOTS).mkdir(exist_ok=True)
                for kind, figure in (("chunks", plot_chunks(chunks)), ("errors", plot_errors(errors))):
                    plots[f"{kind}{name}"] = run / PLOTS / f"{step:08d}_{kind}{name}.png"
                    figure.savefig(plots[f"{kind}{name}"], dpi=80)
        return without_nan(numbers), plots
