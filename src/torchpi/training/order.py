"""The order in which a run sees the samples of its datasets."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from torchpi.errors import TrainingError
from torchpi.randomness import generator_at
from torchpi.training.config import TrainConfig

SampleIndex = tuple[int, int, int, int]
"""Dataset of the mixture, frame, step, position in the batch."""


@dataclasses.dataclass(frozen=True)
class TrainingOrder:
    """The samples of a process' micro-batches.

    Of each dataset all frames come in random order, then all in another one, and so on. The datasets are mixed in
    blocks, in each of which their samples are as many as their weights say, in random order. So the index of any sample
    follows from its number alone: a run that is resumed has to know the step only.
    """

    frames: Sequence[Int[np.ndarray, " _"]]
    """Numbers of the frames that are trained on, per dataset."""
    config: TrainConfig
    first_step: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        self.config.micro_batch_size(self.world_size)  # finds a batch that can't be divided

    def __len__(self) -> int:
        return (self.config.num_steps - self.first_step) * self.config.grad_accum_steps

    def __iter__(self) -> Iterator[list[SampleIndex]]:
        config, size = self.config, self.config.micro_batch_size(self.world_size)
        sources = _Mixture([source.weight for source in config.data.sources], config.seed)
        orders = [_Shuffled(frames, config.seed, number) for number, frames in enumerate(self.frames)]
        for step in range(self.first_step, config.num_steps):
            for micro_batch in range(config.grad_accum_steps):
                start = (micro_batch * self.world_size + self.rank) * size
                indices = []
                for position in range(start, start + size):
                    source, count = sources.at(step * config.batch_size + position)
                    indices.append((source, orders[source].at(count), step, position))
                yield indices


class _Mixture:
    """The dataset of each sample of a run."""

    BLOCK = 1 << 16

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self.ends, self.seed, self.block = np.cumsum(weights) / np.sum(weights), seed, -1
        if min(weights) / sum(weights) * self.BLOCK < 2:
            raise TrainingError(f"A dataset with the weight {min(weights)} of {sum(weights)} is hardly ever drawn.")

    def at(self, number: int) -> tuple[int, int]:
        """The dataset of a sample, and the number of earlier samples from the same one."""
        block, position = divmod(number, self.BLOCK)
        if block != self.block:
            self._enter(block)
        return int(self.sources[position]), int(self.counts[position])

    def _enter(self, block: int) -> None:
        self.block, before = block, self._seen_before(block)
        in_order = np.repeat(np.arange(len(self.ends)), self._seen_before(block + 1) - before)
        self.sources = generator_at(self.seed, "mixture", block).permutation(in_order)
        self.counts = np.empty_like(self.sources)
        for source, start in enumerate(before):
            mine = self.sources == source
            self.counts[mine] = start + np.arange(mine.sum())

    def _seen_before(self, block: int) -> Int[np.ndarray, " sources"]:
        """Samples of each dataset in the earlier blocks."""
        return np.diff(np.rint(self.ends * block * self.BLOCK).astype(np.int64), prepend=0)


class _Shuffled:
    """The frames of a dataset, epoch by epoch."""

    def __init__(self, frames: Int[np.ndarray, " F"], seed: int, number: int) -> None:
        self.frames, self.seed, self.number, self.epoch = frames, seed, number, -1

    def at(self, count: int) -> int:
        """The frame of the sample with this number."""
        epoch, position = divmod(count, len(self.frames))
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = generator_at(self.seed, "order", self.number, epoch).permutation(self.frames)
        return int(self.order[position])
