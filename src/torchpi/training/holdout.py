"""What a run measures on the episodes that it does not train on."""

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from torchpi.evaluation.chunks import predict_chunks, sample_frames
from torchpi.evaluation.errors import errors_of
from torchpi.evaluation.plots import plot_chunks, plot_errors
from torchpi.policy import Policy
from torchpi.randomness import generator_at
from torchpi.training.config import TrainConfig
from torchpi.training.distributed import Forward, World, sum_over_processes
from torchpi.training.samples import Draws, Frames, Place, Samples, loss_sum, num_terms
from torchpi.training.setup import SourceData, robot_names
from torchpi.ui.format import without_nan

PLOTS = "plots"
DRAWS = 4
"""Of noise and time, per held-out sample."""
# No step of training has this number, so none has these draws.
_STEP = 1 << 40


class Holdout:
    """Held-out samples, the same ones with the same draws at each measurement, without augmentation."""

    def __init__(
        self, config: TrainConfig, world: World, data: Sequence[SourceData], policies: Sequence[Policy]
    ) -> None:
        self.config, self.world, self.policies, self.data = config, world, policies, data
        self.batch_size = max(1, config.batch_size // (world.size * config.grad_accum_steps))
        """Of this process, as in training: what fits there fits here."""
        self.sources = [(i, source.holdout) for i, source in enumerate(data) if source.holdout is not None]
        frames = [
            Frames(source.holdout, source.embodiment, policy.transforms, source.source.prompt)
            for source, policy in zip(data, policies, strict=True)
            if source.holdout is not None
        ]
        self._samples = Samples(frames, Draws(config.seed, DRAWS))
        self._batches = list(self._prepare(frames)) if frames else []

    def _prepare(self, frames: Sequence[Frames]) -> Iterator[tuple[dict[str, Any], bool]]:
        """This process' part of each batch, with images as bytes, and whether it counts: all pass as many batches."""
        places = self._places(frames)
        for at in range(0, len(places), self.batch_size * self.world.size):
            own = places[at + self.world.rank * self.batch_size :][: self.batch_size]
            yield self._samples.collate([self._samples[place] for place in own or places[:1]]), bool(own)

    def _places(self, frames: Sequence[Frames]) -> list[Place]:
        found = []
        count = self.config.eval.holdout_samples // len(frames)
        for source, part in enumerate(frames):
            rng = generator_at(self.config.seed, "holdout frames", source)
            found += [(source, int(frame)) for frame in rng.permutation(len(part.dataset))[:count]]
        return [(source, frame, _STEP, i) for i, (source, frame) in enumerate(found)]

    @torch.no_grad()
    def loss(self, forward: Forward) -> dict[str, float]:
        """The mean flow-matching loss."""
        if not self._batches:
            return {}
        total = {"loss": 0.0, "terms": 0.0}
        for stacked, counts in self._batches:
            batch = self._samples.finish(stacked, self.world.device)
            part = loss_sum(forward, batch, self.config.optim.loss)
            if counts:
                total["loss"] += float(part)
                total["terms"] += num_terms(batch, self.config.optim.loss)
        total = sum_over_processes(total)
        return {"holdout_loss": total["loss"] / total["terms"]}

    def chunks(self, run: pathlib.Path, step: int) -> tuple[dict[str, Any], dict[str, pathlib.Path]]:
        """Sample chunks and compare them with the recorded ones.

        Returns:
            The numbers, and the plots that the first process has drawn.
        """
        numbers: dict[str, Any] = {}
        plots: dict[str, pathlib.Path] = {}
        if not self.config.eval.chunk_samples:
            return numbers, plots
        names = robot_names([policy.embodiment for policy in self.policies])
        for number, dataset in self.sources:
            policy = self.policies[number]
            frames = sample_frames(dataset.episode_lengths, self.config.eval.chunk_samples, seed=self.config.seed)
            chunks = predict_chunks(
                policy,
                dataset,
                frames,
                seed=self.config.seed,
                batch_size=self.batch_size,
                prompt=self.data[number].source.prompt,
            )
            errors = errors_of(chunks, dataset.columns["action"])
            name = f"_{names[number]}" if number else ""
            scaled = errors.mae() / errors.ranges
            numbers |= {
                f"chunk_error{name}": errors.overall().mae_scaled,
                f"chunk_error_dims{name}": {
                    dim.name: float(value) for dim, value in zip(errors.dimensions, scaled, strict=True)
                },
                f"chunk_error_steps{name}": [float(value) for value in errors.scaled_per_step()],
            }
            if self.world.first:
                (run / PLOTS).mkdir(exist_ok=True)
                for kind, figure in (("chunks", plot_chunks(chunks)), ("errors", plot_errors(errors))):
                    plots[f"{kind}{name}"] = run / PLOTS / f"{step:08d}_{kind}{name}.png"
                    figure.savefig(plots[f"{kind}{name}"], dpi=80)
        return without_nan(numbers), plots
